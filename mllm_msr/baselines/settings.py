"""Settings that several baselines have in common; those of one are in its own file."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mllm_msr.core.params import (
    BatchSize,
    Count,
    Depth,
    Dropout,
    Epochs,
    LearningRate,
    Section,
    Seed,
    Share,
    Width,
)


class TextParams(Section):
    """Which terms of a text are compared (mllm_msr/baselines/texts.py)."""

    analyzer: Literal["word", "char_wb"]  # terms are words, or characters within words
    min_ngram: Count  # words or characters of the shortest term
    max_ngram: Count  # of the longest

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.min_ngram > self.max_ngram:
            raise ValueError("min_ngram is larger than max_ngram")
        return self


class LearnedParams(Section):
    """Training of Cornac's models of sequences (baselines/learning/cornac_models.py)."""

    width: Width  # of the vectors
    epochs: Epochs
    batch_size: BatchSize  # steps, each from the items so far to the next
    learning_rate: LearningRate
    loss: Literal["bpr", "bpr-max", "cross-entropy", "bce"]
    negatives: Annotated[
        int, Field(ge=0, le=1_000_000)
    ]  # drawn per batch, besides the batch's other targets
    popularity_exponent: Share  # of the draws; 0: uniform, 1: by popularity
    seed: Seed


class TransformerParams(LearnedParams):
    """Attention over the history."""

    dropout: Dropout
    blocks: Depth
    heads: Depth  # each of an equal share of the width

    @model_validator(mode="after")
    def _refuse_unequal_heads(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is a multiple of heads; got {self.width} and {self.heads}")
        return self


class SequentialParams(Section):
    """A network that reads the features of a history (baselines/learning/sequential.py)."""

    network: Literal["gru", "attention"]  # of GRU4Rec, of SASRec
    ids: bool  # whether an item has a vector of its own, besides its features
    features: list[Literal["image", "summary"]]  # columns of the table Features
    width: Width  # of an item's vector and of a state
    layers: Depth
    dropout: Dropout
    epochs: Epochs  # at most; the best by AUC on valid is kept
    patience: Epochs  # epochs without a better one, after which training ends
    batch_size: BatchSize  # windows of a user's known items
    learning_rate: LearningRate
    seed: Seed

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if not (self.ids or self.features):
            raise ValueError("ids is false and features is empty: items would all be alike")
        if len(set(self.features)) < len(self.features):
            raise ValueError("features names one twice")
        return self
