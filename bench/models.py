"""Speed and memory of the model stages against a reference implementation with the same weights.

    dvc repro
    python -m bench.models

Prints one JSON line per case; ``docs/benchmarks.md`` explains its fields. Each side runs in a
process of its own, so that peak memory is measured separately, and the two alternate, so that a
machine that slows down affects both. The line has the median of the runs. Timing excludes loading
weights and building prompts from the tables; it includes rendering and tokenizing, and on our side
reading pixels, which the reference has decoded before. Prompts are those of the pipeline in
``data/`` with ``params.yaml``; ``--model`` replaces all three models (see ``bench/shapes.py``).
"""

import json
from functools import partial
from typing import Annotated

import typer

from bench.preferences import (
    answer_continuously,
    answer_in_slots,
    compare_texts,
    infer,
    infer_by_reference,
)
from bench.scoring import compare_scores, score, score_by_reference
from bench.timing import Case, Options, run_case
from bench.training import compare_areas, fine_tune, train_packed, tune_by_reference
from mllm_msr.core.errors import report_errors_on_one_line

CASES = {
    "scoring": Case(
        "scoring; the reference generates all 30 tokens",
        "pairs",
        score,
        partial(score_by_reference, every_token=True),
        compare_scores,
    ),
    "scoring-short": Case(
        "scoring; the reference stops where the answer ends",
        "pairs",
        score,
        partial(score_by_reference, every_token=False),
        compare_scores,
    ),
    "preferences": Case("recurrent preferences", "users", infer, infer_by_reference, compare_texts),
    "training": Case("fine-tuning", "pairs", train_packed, tune_by_reference, lambda *_: {}),
    "continuous": Case(
        "our continuous batching, and that of transformers",
        "prompts",
        answer_in_slots,
        answer_continuously,
        compare_texts,
    ),
    "quality": Case(
        "validation AUC of fine-tuning on packed rows, and on whole prompts",
        "pairs",
        partial(fine_tune, packed=True),
        partial(fine_tune, packed=False),
        compare_areas,
        once=True,
    ),
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEFAULT_CASES = ["scoring", "scoring-short", "preferences", "training"]


@app.command()
def main(
    case: Annotated[list[str], typer.Option(help=", ".join(CASES))] = DEFAULT_CASES,
    model: Annotated[
        str | None, typer.Option(help="Folder of a model that replaces all models.")
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            help="Sequences of our side; default 100 to score, 600 to infer, all to train."
        ),
    ] = None,
    reference_count: Annotated[
        int | None, typer.Option(help="The same for the reference; default 20, 30 and 40 batches.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Batch size of fine-tuning; default that of params.yaml.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each side.", min=1)] = 3,
) -> None:
    """Print one JSON line per case."""
    options = Options(model, sequences, reference_count, batch_size)
    for name in case:
        if name not in CASES:
            raise typer.BadParameter(f"{name} is none of {', '.join(CASES)}", param_hint="--case")
    for name in case:
        turns = 1 if CASES[name].once else repeats
        typer.echo(json.dumps(run_case(CASES[name], options, turns)))


if __name__ == "__main__":
    with report_errors_on_one_line():
        app()
