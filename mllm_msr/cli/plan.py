"""``mllm-msr plan``: what the model stages would ask, before they do.

mllm-msr plan --tokens-per-second 20000
"""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.command import Params, Prompts
from mllm_msr.core.errors import report_errors_on_one_line
from mllm_msr.core.params import load_all_params

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plan(
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Of prompts and responses, on your machine.", show_default="no time"
        ),
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the stages' outputs.")] = Path("data"),
    params: Params = Path("params.yaml"),
    prompts: Prompts = Path("prompts.yaml"),
) -> None:
    """Print prompts, stored responses and tokens of each stage that asks a model.

    Tokens are of the prompts without a response, measured on a sample; new tokens are the most that
    the settings allow. No weights are loaded. Fine-tuning asks nothing, and is not counted.

    Example: mllm-msr plan --tokens-per-second 20000
    """
    from mllm_msr.method.planning import plan_stages  # loads torch

    settings = load_all_params(params)
    heading = ["stage", "prompts", "stored", "prompt tokens", "new tokens, at most"]
    lines = [[*heading, *(["time, at most"] if tokens_per_second else [])]]
    for stage in plan_stages(data, settings, prompts):
        counts = (stage.prompts, stage.stored, stage.prompt_tokens, stage.new_tokens)
        lines.append([stage.stage, *(f"{count:,}" for count in counts)])
        if tokens_per_second:
            lines[-1].append(str(timedelta(seconds=round(stage.tokens / tokens_per_second))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        typer.echo("  ".join([first.ljust(widths[0]), *cells]))
    if len(lines) == 1:
        typer.echo("no stage asks a model")


def main() -> None:
    """Run the command."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()
