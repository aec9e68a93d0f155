"""Presets: settings that belong together, written to ``params.yaml`` without touching its comments.

A preset is a YAML file of the folder ``presets`` beside ``params.yaml``. It holds the keys that it
decides, nested as there, under a comment whose first line says what it is.

    mllm-msr presets list
    mllm-msr presets show microlens
    mllm-msr presets apply microlens
    mllm-msr presets apply microlens smollm2_text

``python -m mllm_msr.presets`` is the same.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from mllm_msr.core.command import Params
from mllm_msr.core.errors import ParamsError, report_errors_on_one_line
from mllm_msr.core.files import atomic_write
from mllm_msr.core.params import check_params, parse_yaml, read_yaml

SETTINGS = Path("params.yaml")  # of the working folder

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME...",
        help="Names as printed by presets list; later presets override earlier ones.",
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the presets.",
        show_default="presets beside the file of settings, else the shipped ones",
    ),
]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Presets of settings: list them, show what one would change, apply it.",
)


@dataclass(frozen=True)
class Change:
    """A setting that a preset changes.

    Attributes:
        key: Section and key, joined by dots.
        old: What ``params.yaml`` says now.
        new: What the preset says.
    """

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """Return the line that the commands print."""
        return f"{self.key}: {format_value(self.old)} -> {format_value(self.new)}"


@app.command("list")
def list_presets(params: Params = SETTINGS, folder: Folder = None) -> None:
    """Print each preset's name and what it is.

    Example: mllm-msr presets list
    """
    presets = find_presets(folder or default_folder(params))
    width = max(map(len, presets))
    for name, file in presets.items():
        typer.echo(f"{name:{width}}  {describe(file)}".rstrip())


@app.command()
def show(names: Names, params: Params = SETTINGS, folder: Folder = None) -> None:
    """Print what presets would change; write nothing.

    Example: mllm-msr presets show microlens
    """
    presets = open_presets(names, folder or default_folder(params))
    params = settings_or_shipped(params)
    changes, _ = plan(presets, params)
    _print_changes(changes, params)


@app.command()
def apply(names: Names, params: Params = SETTINGS, folder: Folder = None) -> None:
    """Write the values of presets to the file of settings; all of them or none.

    Example: mllm-msr presets apply microlens smollm2_text
    """
    changes, text = plan(open_presets(names, folder or default_folder(params)), params)
    _print_changes(changes, params)
    if changes:
        with atomic_write(params) as temporary:
            temporary.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {params}: {len(changes)} settings")
    typer.echo(f"next: {_next_step(parse_yaml(text, params)['preprocess']['source'])}")


def find_shipped(name: str) -> Path:
    """Return a file or folder that the repository has at its top level.

    A wheel has those that ``setup.py`` names, in the folder ``shipped`` of this package.
    """
    package = Path(__file__).parent
    packaged = package / "shipped" / name
    return packaged if packaged.exists() else package.parent / name


def settings_or_shipped(params: Path) -> Path:
    """Return the file of settings, or the shipped one where the working folder has none.

    A missing file of another name stays an error of whoever reads it.
    """
    if params != SETTINGS or params.is_file():
        return params
    shipped = find_shipped("params.yaml")
    typer.echo(f"no {params} here; reading the shipped {shipped}", err=True)
    return shipped


def default_folder(params: Path) -> Path:
    """Return the folder ``presets`` beside the settings, or the shipped one if there is none."""
    beside = params.parent / "presets"
    return beside if beside.is_dir() else find_shipped("presets")


def find_presets(folder: Path) -> dict[str, Path]:
    """Return the presets of a folder, by name.

    Raises:
        ParamsError: There is none.
    """
    presets = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if not presets:
        fix = "run from the project's folder, or name another with --folder"
        raise ParamsError(expected="a folder of presets", got="none", where=str(folder), fix=fix)
    return presets


def describe(file: Path) -> str:
    """Return the first line of the comment that opens a preset; empty if there is no comment."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[0].removeprefix("#").strip() if lines and lines[0].startswith("#") else ""


def plan(presets: Sequence[Path], params: Path) -> tuple[list[Change], str]:
    """Compute what presets change, applied one after another; write no file.

    Returns:
        The changes, in the presets' order, and the text of ``params.yaml`` after them, in which
        only the lines of the changed values differ.

    Raises:
        ParamsError: A preset has an unknown key or a value that no stage accepts, or a file is
            invalid by itself.
    """
    check_params(read_yaml(params), params)
    text = before = params.read_text(encoding="utf-8")
    document = _load_with_comments(text, params)
    changes: dict[str, Change] = {}
    for preset in presets:
        for keys, new in _flatten(read_yaml(preset)):
            if change := _set(document, keys, new, preset):
                old = changes.get(change.key, change).old
                changes[change.key] = Change(change.key, old, change.new)
        if changes:
            text = _write_with_comments(document)
            # Check the text as the stages will read it, before it reaches the file.
            check_params(parse_yaml(text, preset), preset)
    found = [change for change in changes.values() if change.old != change.new]
    return found, text if found else before


def open_presets(names: Sequence[str], folder: Path) -> list[Path]:
    """Return the files of presets by their names.

    Raises:
        ParamsError: There is no preset of a name.
    """
    presets = find_presets(folder)
    for name in names:
        if name not in presets:
            fix = "choose one of them, or write it"
            expected = f"a preset among {', '.join(presets)}"
            raise ParamsError(expected=expected, got=name, where=str(folder), fix=fix)
    return [presets[name] for name in names]


def _flatten(settings: dict[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield (keys from the section down, value) of every value that is no mapping."""
    for key, value in settings.items():
        keys = (*above, str(key))
        if isinstance(value, dict):
            yield from _flatten(value, keys)
        else:
            yield keys, value


def _set(document: CommentedMap, keys: tuple[str, ...], new: Any, preset: Path) -> Change | None:
    """Set one value in the document; return None if the document has it already.

    Raises:
        ParamsError: The document has no such key.
    """
    place = document
    for depth, key in enumerate(keys):
        if not isinstance(place, CommentedMap) or key not in place:
            known = ", ".join(place) if isinstance(place, CommentedMap) else "no keys"
            where = f"{preset}, {'.'.join(keys[:depth])}".removesuffix(", ")
            raise ParamsError(
                expected=f"keys among {known}", got=key, where=where, fix="correct or remove it"
            )
        above, place = place, place[key]
    if place == new:
        return None
    change = Change(".".join(keys), place, new)
    above[keys[-1]] = _replace_list(place, new) if isinstance(place, CommentedSeq) else new
    return change


def _replace_list(old: CommentedSeq, new: Any) -> Any:
    """Return a new list with the old one's brackets and comment, which ruamel.yaml keeps there."""
    if not isinstance(new, list):
        return new
    sequence = CommentedSeq(new)
    old.copy_attributes(sequence)
    return sequence


class _Representer(RoundTripRepresenter):
    """Write null as the word; ruamel.yaml would leave the value empty."""

    def represent_null(self, _: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_null)


def _editor() -> YAML:
    """Return a YAML reader and writer that keeps comments, order, quotes and long lines."""
    editor = YAML()
    editor.Representer = _Representer
    editor.preserve_quotes = True
    editor.width = 10_000
    return editor


def _load_with_comments(text: str, path: Path) -> CommentedMap:
    """Read settings together with their comments.

    Raises:
        ParamsError: The YAML is invalid, such as a duplicate key.
    """
    try:
        document: CommentedMap = _editor().load(text)
    except YAMLError as error:
        raise ParamsError(
            expected="valid YAML", got=str(error), where=str(path), fix="correct the syntax"
        ) from error
    return document


def _write_with_comments(document: CommentedMap) -> str:
    buffer = io.StringIO()
    _editor().dump(document, buffer)
    return buffer.getvalue()


def _print_changes(changes: list[Change], params: Path) -> None:
    for change in changes:
        typer.echo(str(change))
    if not changes:
        typer.echo(f"nothing to change: {params} already says so")


def format_value(value: Any) -> str:
    """Return a setting's value on one line, as YAML reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def _next_step(source: str) -> str:
    """Return what to do after a preset was applied."""
    if source == "pocket":
        return "dvc repro"
    return f"put the raw files into data/raw/{source} (docs/datasets.md), then dvc repro"


def main() -> None:
    """Run the commands; an error meant for users becomes one line and exit code 1."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()
