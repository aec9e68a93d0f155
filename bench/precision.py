"""Accuracy of scores in bfloat16 against float32, in packed rows and one pair at a time.

    dvc repro
    python -m bench.precision
    python -m bench.precision --model models/smollm2-135m-instruct --sequences 5

Prints one JSON line per variant: the maximum and mean difference of the log-odds from those in
float32 one pair at a time, their standard deviation in float32, and the AUC, on test sequences of
``data/`` with the adapter of ``data/sft``. Another model is measured without an adapter, and a
text-only one without images.
"""

import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.metrics import roc_auc_score

from bench.pipeline import DATA, build, recommender
from mllm_msr.core.arrays import Floats
from mllm_msr.core.command import run
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.method.adapters import add_adapter
from mllm_msr.method.examples import Example
from mllm_msr.method.scoring import ScoringModel, run_forward


def main(
    sequences: Annotated[int, typer.Option(help="Number of test sequences.")] = 50,
    model: Annotated[str | None, typer.Option(help="Another model, without an adapter.")] = None,
) -> None:
    """Score the same pairs in both dtypes, packed and one at a time."""
    exact: Floats | None = None
    for dtype, packed in product((torch.float32, torch.bfloat16), (False, True)):
        with recommender(model) as inputs, TemporaryDirectory() as folder:
            inputs.model.dtype = dtype
            examples = build(inputs, "test", sequences)
            adapter = save_empty_adapter(inputs.model, folder) if model else DATA / "sft/adapter"
            scorer = ScoringModel(inputs.model, adapter, inputs.answer_token_ids, trained=False)
            found = score(scorer, [example.prompt for example in examples], packed)
        exact = found if exact is None else exact
        off = np.abs(found - exact)
        line = {
            "way": f"{str(dtype)[6:]}, {'packed' if packed else 'one pair at a time'}",
            "pairs": len(examples),
            "largest_difference": float(f"{off.max():.1e}"),
            "mean_difference": float(f"{off.mean():.1e}"),
            "deviation": float(f"{exact.std():.1e}"),
            "auc": round(mean_auc(examples, found), 4),
        }
        typer.echo(json.dumps(line))


def save_empty_adapter(model: LocalModel, folder: str) -> Path:
    """Save an adapter that changes nothing, and return its folder."""
    adapter = add_adapter(model.load(), rank=1, alpha=1, dropout=0.0, layers=["q_proj"])
    adapter.save_pretrained(folder)
    return Path(folder)


def score(scorer: ScoringModel, prompts: Sequence[Prompt], packed: bool) -> Floats:
    """Return the log-odds of each prompt, in packed rows or one prompt at a time."""
    log_odds = np.zeros(len(prompts))
    singly = ([number] for number in range(len(prompts)))
    for batch in scorer.batches(prompts) if packed else singly:
        asked = [prompts[number] for number in batch]
        forward = partial(run_packed if packed else run_whole, scorer, asked)
        log_odds[batch] = run_forward(forward).float().cpu().numpy()
    return log_odds


def run_whole(scorer: ScoringModel, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Return the logits of yes and no, (prompts, 2), from whole prompts."""
    inputs = scorer.model.move(scorer.model.encoder.encode(prompts))
    logits: torch.Tensor = scorer.weights(**inputs, logits_to_keep=1).logits
    return logits[:, -1]


def run_packed(scorer: ScoringModel, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Return the logits of yes and no, (prompts, 2), from packed rows."""
    packer = scorer.packer
    assert packer is not None
    return packer.run(scorer.weights, packer.pack(prompts).to(scorer.model.device))


def mean_auc(examples: Sequence[Example], scores: Floats) -> float:
    """Return the mean AUC over sequences, among the negatives of all samplings together."""
    sequences = np.array([example.question.sequence for example in examples])
    labels = np.array([example.question.label for example in examples])
    parts = [sequences == sequence for sequence in np.unique(sequences)]
    return float(np.mean([roc_auc_score(labels[part], scores[part]) for part in parts]))


if __name__ == "__main__":
    run(main)
