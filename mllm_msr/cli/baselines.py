"""``mllm-msr baselines``: list the baselines, show the settings of one.

mllm-msr baselines list
mllm-msr baselines show sasrec
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from mllm_msr.baselines.discovery import all_baselines, find_baseline
from mllm_msr.core.command import Params
from mllm_msr.core.params import check_params, read_yaml
from mllm_msr.presets import SETTINGS, format_value, settings_or_shipped

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="The baselines that MLLM-MSR is compared with: list them, show the settings of one.",
)


@app.command("list")
def list_baselines(params: Params = SETTINGS) -> None:
    """Print each baseline's name and label, its stage, and whether the settings switch it on.

    Example: mllm-msr baselines list
    """
    settings = _read_settings(params)
    rows = [
        (each.name, each.label, each.stage, _on_or_off(each.name in settings[each.stage]["models"]))
        for each in all_baselines()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A baseline, one of those that list prints.")],
    params: Params = SETTINGS,
) -> None:
    """Print a baseline's settings as YAML.

    Example: mllm-msr baselines show sasrec
    """
    baseline = find_baseline(name)
    for key, value in _read_settings(params)[baseline.stage][baseline.name].items():
        typer.echo(f"{key}: {format_value(value)}")


def _read_settings(params: Path) -> dict[str, Any]:
    """Read and check all settings; the shipped ones where the working folder has none."""
    path = settings_or_shipped(params)
    settings = read_yaml(path)
    check_params(settings, path)
    return settings


def _on_or_off(on: bool) -> str:
    return "on" if on else "off"
