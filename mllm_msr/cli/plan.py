"""``mllm-msr plan``: the model calls that a run still needs.

mllm-msr plan --tokens-per-second 20000
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Params, Prompts
from mllm_msr.core.errors import report_errors_on_one_line
from mllm_msr.core.files import state_dir
from mllm_msr.core.params import Params as Settings
from mllm_msr.core.params import check_params, parse_yaml
from mllm_msr.core.tables import count_rows
from mllm_msr.presets import default_folder, open_presets
from mllm_msr.presets import plan as plan_presets

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plan(
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Assumed throughput of one GPU, for prompt and generated tokens.",
            show_default="no time",
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help="Plan with the models and settings of a preset; repeatable.",
            show_default="settings as they are",
        ),
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the stages' outputs.")] = Path("data"),
    params: Params = Path("params.yaml"),
    prompts: Prompts = Path("prompts.yaml"),
) -> None:
    """Print prompts, stored responses and tokens of each stage that runs a model, and progress.

    Tokens are of the prompts without a response, measured on a sample; new tokens are the most that
    the settings allow. No weights are loaded. Fine-tuning and features are not kept in the response
    store, so their rows always show a whole run; the second table shows the progress of fine-tuning
    and image fetching.

    --preset changes models and settings but not the tables, and loads the tokenizers of its models
    from their folders or the hub.

    Example: mllm-msr plan --tokens-per-second 20000
    """
    from mllm_msr.planning import plan_stages  # loads torch

    settings = _read_settings(params, preset or [])
    heading = ["stage", "prompts", "stored", "missing", "prompt tokens", "new tokens, at most"]
    lines = [[*heading, *(["time, at most", "GPU-hours"] if tokens_per_second else [])]]
    for stage in plan_stages(data, settings, prompts):
        missing = stage.prompts - stage.stored
        counts = (stage.prompts, stage.stored, missing, stage.prompt_tokens, stage.new_tokens)
        lines.append([stage.stage, *(f"{count:,}" for count in counts)])
        if tokens_per_second:
            seconds = stage.tokens / tokens_per_second
            lines[-1] += [str(timedelta(seconds=round(seconds))), f"{seconds / 3600:.2f}"]
    _print_table(lines)
    if len(lines) == 1:
        typer.echo("no stage runs a model")
    if progress := [*_read_images(data / "fetch_images"), *_read_checkpoints(state_dir() / "sft")]:
        typer.echo("")
        _print_table([["stage", "done", "missing", "failed"], *progress])


def _read_settings(params: Path, names: Sequence[str]) -> Settings:
    """Return the settings of a run as they would be with presets applied; write nothing."""
    files = open_presets(names, default_folder(params)) if names else []
    _, text = plan_presets(files, params)
    return check_params(parse_yaml(text, params), params)


def _read_images(folder: Path) -> Iterator[list[str]]:
    """Yield how many images were fetched and how many failed, if the stage has run."""
    done, failed = folder / "images.parquet", folder / "failures.parquet"
    if done.is_file() and failed.is_file():
        yield ["fetch_images, images", f"{count_rows(done):,}", "0", f"{count_rows(failed):,}"]


def _read_checkpoints(folder: Path) -> Iterator[list[str]]:
    """Yield the steps of each fine-tuning that was begun and not finished, by its last checkpoint.

    Upstream: ``trainer_state.json`` of ``transformers.trainer.Trainer``, with ``global_step`` and
    ``max_steps``.
    """
    for work in sorted(folder.glob("*")):
        states = []
        for path in work.glob("checkpoint-*/trainer_state.json"):
            with contextlib.suppress(ValueError):  # the run was killed while it wrote the file
                states.append(json.loads(path.read_text(encoding="utf-8")))
        if states:
            last = max(states, key=lambda state: int(state["global_step"]))
            done, steps = int(last["global_step"]), int(last["max_steps"])
            yield [f"sft, steps ({work.name[:8]})", f"{done:,}", f"{steps - done:,}", "0"]


def _print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print rows, the head first, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        typer.echo("  ".join([first.ljust(widths[0]), *cells]))


def main() -> None:
    """Run the command."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()
