"""A score is the difference of the log-softmax of yes and no, whatever the model family."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from small_adapter import save_adapter
from small_world import SmallWorld
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mllm_msr.core.errors import ModelError
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.method.examples import (
    Example,
    Question,
    RecommenderInputs,
    read_questions,
)
from mllm_msr.method.inference import greedy_engine
from mllm_msr.method.scoring import AnswerHead, ScoringModel, score_examples, scoring_engine


@pytest.fixture
def trained(recommender: RecommenderInputs, tmp_path: Path) -> ScoringModel:
    adapter = save_adapter(recommender.model.encoder, tmp_path / "adapter", strength=0.3)
    return ScoringModel(recommender.model, adapter, recommender.answer_token_ids, trained=True)


@torch.inference_mode()
def plain_scores(recommender: RecommenderInputs, adapter: Path, world: SmallWorld) -> list[float]:
    """Score as anyone would: a full forward, the whole vocabulary, plain peft."""
    encoder = recommender.model.encoder
    family = AutoModelForImageTextToText if encoder.takes_images else AutoModelForCausalLM
    model = PeftModel.from_pretrained(family.from_pretrained(encoder.name), str(adapter)).eval()
    scores = []
    for split in ("valid", "test"):
        for question in read_questions(world.candidates(split)):
            prompt = recommender.builder.build(question).prompt
            logits = model(**encoder.encode([prompt])).logits[0, -1]
            yes, no = (
                logits.log_softmax(-1)[encoder.answer_token_id(prompt, answer)]
                for answer in ("yes", "no")
            )
            scores.append(float(yes - no))
    return scores


def build(
    recommender: RecommenderInputs, world: SmallWorld, *splits: str
) -> dict[str, list[Example]]:
    return {
        split: [
            recommender.builder.build(question)
            for question in read_questions(world.candidates(split))
        ]
        for split in splits
    }


@pytest.mark.parametrize("way", ["packed", "whole prompts", "pixels"])
def test_a_score_is_the_log_odds_of_a_plain_forward(
    recommender: RecommenderInputs,
    trained: ScoringModel,
    world: SmallWorld,
    tmp_path: Path,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "whole prompts":  # as with sliding-window attention
        monkeypatch.setattr("mllm_msr.engines.packing.supports_packing", lambda _: False)
    if way == "pixels":  # as with an undeclared family
        monkeypatch.setattr("mllm_msr.method.scoring.make_packer", lambda *_: None)
    packs = way == "packed" or (way == "whole prompts" and recommender.model.encoder.takes_images)
    assert (trained.packer is not None) == packs
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        engine = scoring_engine(trained, store, recommender.builder.limit)
        rows = score_examples(build(recommender, world, "valid", "test"), engine)
        assert [(row.sequence, row.item, row.split) for row in rows] == [
            *[(1, "b", "valid"), (1, "d", "valid"), (1, "t", "valid")],
            *[(2, "e", "test"), (2, "f", "test"), (2, "c", "test")],
        ]
        expected = plain_scores(recommender, trained.adapter, world)
        assert [row.log_odds for row in rows] == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 1e-3
        if (
            trained.packer and recommender.model.encoder.takes_images
        ):  # b, t, e, f, c have images, d has none
            assert trained.packer.image_features.computed == len("btefc")
        # From the store, scores are the same to the last bit.
        again = scoring_engine(trained, store, recommender.builder.limit)
        assert score_examples(build(recommender, world, "valid"), again) == rows[:3]
        assert again.computed == 0


def test_an_adapter_that_changes_nothing_although_trained_is_an_error(
    recommender: RecommenderInputs, world: SmallWorld, tmp_path: Path
) -> None:
    adapter = save_adapter(recommender.model.encoder, tmp_path / "adapter", strength=0.0)
    question = read_questions(world.candidates("valid"))[0]
    prompts = [recommender.builder.build(question).prompt]
    idle = ScoringModel(recommender.model, adapter, recommender.answer_token_ids, trained=True)
    with pytest.raises(ModelError, match="expected an adapter that changes the scores; got none"):
        idle.score_batch(prompts)
    # An untrained adapter may change nothing: zero-shot.
    zero_shot = ScoringModel(
        recommender.model, adapter, recommender.answer_token_ids, trained=False
    )
    found = float(zero_shot.score_batch(prompts)[0].text)
    yes, no = recommender.answer_token_ids
    with torch.inference_mode():
        model = recommender.model
        logits = model.weights(**model.encoder.encode(prompts)).logits[0, -1]
    assert found == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)


def test_the_check_is_made_once(trained: ScoringModel, recommender: RecommenderInputs) -> None:
    prompt = recommender.builder.build(Question(1, "a", label=True)).prompt
    first = trained.score_batch([prompt])
    assert not trained._must_change
    assert trained.score_batch([prompt]) == first


def test_another_adapter_is_scored_again(
    recommender: RecommenderInputs, trained: ScoringModel, world: SmallWorld, tmp_path: Path
) -> None:
    other = ScoringModel(
        recommender.model,
        save_adapter(recommender.model.encoder, tmp_path / "other", 0.5),
        recommender.answer_token_ids,
        trained=True,
    )
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        first, second = (
            score_examples(build(recommender, world, "valid"), scoring_engine(each, store, 512))
            for each in (trained, other)
        )
    assert all(a.log_odds != b.log_odds for a, b in zip(first, second, strict=True))


def test_other_answer_tokens_are_scored_again(
    recommender: RecommenderInputs, trained: ScoringModel, world: SmallWorld, tmp_path: Path
) -> None:
    swapped = ScoringModel(
        recommender.model, trained.adapter, recommender.answer_token_ids[::-1], trained=True
    )
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        first, second = (
            score_examples(build(recommender, world, "valid"), scoring_engine(each, store, 512))
            for each in (trained, swapped)
        )
    for one, other in zip(first, second, strict=True):
        assert one.log_odds == pytest.approx(-other.log_odds, abs=1e-4)


def test_a_response_is_not_taken_for_a_score(
    recommender: RecommenderInputs, trained: ScoringModel, tmp_path: Path
) -> None:
    prompt = recommender.builder.build(Question(1, "a", label=True)).prompt
    with (
        ResponseStore(tmp_path / "responses.sqlite") as store,
        tqdm(disable=True) as progress,
    ):
        greedy_engine(recommender.model, store, 1).respond([prompt], progress)
        scoring = scoring_engine(trained, store, 512)
        float(scoring.respond([prompt], progress)[0])
        assert scoring.computed == 1


@pytest.mark.parametrize("bias", [False, True])
def test_the_answer_head_gives_float32_logits_of_two_rows(bias: bool) -> None:
    torch.manual_seed(0)
    output = nn.Linear(8, 20, bias=bias).bfloat16()
    hidden = torch.randn(2, 3, 8).bfloat16()
    found = AnswerHead(output, (5, 2))(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, output.float()(hidden.float())[..., [5, 2]])


def test_scores_are_float32_where_the_model_is_not(
    recommender: RecommenderInputs,
    trained: ScoringModel,
    world: SmallWorld,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recommender.model, "dtype", torch.bfloat16)
    prompts = [
        recommender.builder.build(q).prompt for q in read_questions(world.candidates("test"))
    ]
    assert trained.weights.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16
    adapter = [weight for name, weight in trained.weights.named_parameters() if "lora_" in name]
    assert {weight.dtype for weight in adapter} == {torch.bfloat16}
    scores = [float(response.text) for response in trained.score_batch(prompts)]
    # bfloat16 has 8 bits of mantissa; log-odds in float32 use more.
    assert any(float(torch.tensor(score).bfloat16()) != score for score in scores)


def test_score_keys_are_those_of_earlier_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another key would compute every stored score again.
    monkeypatch.setattr("mllm_msr.method.scoring.adapter_identity", lambda _: "adapter")
    model = SimpleNamespace(encoder=None, identity="model", precision="torch.float32", budget=None)
    recommender = ScoringModel(model, tmp_path, (5, 6), trained=True)  # type: ignore[arg-type]
    with ResponseStore(tmp_path / "responses.sqlite") as store:
        key = scoring_engine(recommender, store, 512).key(Prompt("Describe"))
    assert key == "e69bcf336257f11588d17fb6816a71e454a353e27a699ec580dfae2062535e98"
