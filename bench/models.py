"""How fast the model stages are, against the way of research code, with the same weights.

    dvc repro
    python -m bench.models

One JSON line for each case; ``docs/benchmarks.md`` says what stands in it. Each side has a process
of its own, so that its peak of memory is its own, and the two take turns, so that a machine which
becomes slower does so for both. Of the turns the line has the median. Weights are loaded before the
clock starts, and prompts are made from the tables; rendering, tokenising, reading pixels and all of
the rest is inside, for both. Prompts are the pipeline's own, of ``data/`` and ``params.yaml``;
``--model`` puts another model in the place of all three (see ``bench/shapes.py``).
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
    infer_plainly,
)
from bench.racing import Case, Options, race
from bench.scoring import compare_scores, score, score_plainly
from bench.training import compare_areas, tune, tune_plainly, tune_wholly

CASES = {
    "scoring": Case(
        "scoring; the reference generates all 30 tokens",
        "pairs",
        score,
        partial(score_plainly, every_token=True),
        compare_scores,
    ),
    "scoring-short": Case(
        "scoring; the reference stops where the answer ends",
        "pairs",
        score,
        partial(score_plainly, every_token=False),
        compare_scores,
    ),
    "preferences": Case("recurrent preferences", "users", infer, infer_plainly, compare_texts),
    "training": Case("fine-tuning", "pairs", tune, tune_plainly, lambda *_: {}),
    "continuous": Case(
        "our slots, and transformers' continuous batching",
        "prompts",
        answer_in_slots,
        answer_continuously,
        compare_texts,
    ),
    "quality": Case(
        "validation AUC of fine-tuning packed, and by whole prompts",
        "pairs",
        partial(tune_wholly, packed=True),
        partial(tune_wholly, packed=False),
        compare_areas,
        once=True,
    ),
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
USUAL = ["scoring", "scoring-short", "preferences", "training"]


@app.command()
def main(
    case: Annotated[list[str], typer.Option(help=", ".join(CASES))] = USUAL,
    model: Annotated[str | None, typer.Option(help="Folder of another model.")] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Sequences of our side: 100 to score, 600 to infer, all.")
    ] = None,
    of_reference: Annotated[
        int | None, typer.Option(help="Of the other: 20 to score, 30 to infer, 40 batches.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of fine-tuning; as in params.yaml if not given.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns of each side.", min=1)] = 3,
) -> None:
    """Print one JSON line for each case."""
    options = Options(model, sequences, of_reference, batch_size)
    for name in case:
        if name not in CASES:
            raise typer.BadParameter(f"{name} is none of {', '.join(CASES)}", param_hint="--case")
        turns = 1 if CASES[name].once else repeats
        typer.echo(json.dumps(race(CASES[name], options, turns)))


if __name__ == "__main__":
    app()
