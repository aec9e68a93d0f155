"""Presets: settings that belong together, written to ``params.yaml`` without touching its comments.

A preset is a YAML file of the folder ``presets`` beside ``params.yaml``. It holds the keys that it
decides, nested as there, under a comment whose first line says what it is.

    python -m mllm_msr.presets list
    python -m mllm_msr.presets show microlens
    python -m mllm_msr.presets apply microlens
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from mllm_msr.core.errors import ParamsError, report_errors_on_one_line
from mllm_msr.core.files import atomic_write
from mllm_msr.core.params import check_params, parse_yaml, read_yaml

Name = Annotated[str, typer.Argument(help="A preset, one of those that list prints.")]
Params = Annotated[Path, typer.Option(help="The file of settings.")]
Folder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the presets.", show_default="presets, beside the file of settings"
    ),
]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Settings that belong together: list them, see what one would change, apply it.",
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
        """Give the line that the commands print."""
        return f"{self.key}: {_show_value(self.old)} -> {_show_value(self.new)}"


@app.command("list")
def list_presets(params: Params = Path("params.yaml"), folder: Folder = None) -> None:
    """Print each preset's name and what it is.

    Example: python -m mllm_msr.presets list
    """
    presets = find_presets(folder or params.parent / "presets")
    width = max(map(len, presets))
    for name, file in presets.items():
        typer.echo(f"{name:{width}}  {describe(file)}".rstrip())


@app.command()
def show(name: Name, params: Params = Path("params.yaml"), folder: Folder = None) -> None:
    """Print what a preset would change; write nothing.

    Example: python -m mllm_msr.presets show microlens
    """
    changes, _ = plan(_open_preset(name, folder or params.parent / "presets"), params)
    _print_changes(changes, params)


@app.command()
def apply(name: Name, params: Params = Path("params.yaml"), folder: Folder = None) -> None:
    """Write a preset's values to the file of settings; all of them or none.

    Example: python -m mllm_msr.presets apply microlens
    """
    changes, text = plan(_open_preset(name, folder or params.parent / "presets"), params)
    _print_changes(changes, params)
    if changes:
        with atomic_write(params) as temporary:
            temporary.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {params}: {len(changes)} settings")
    typer.echo(f"next: {_next_step(parse_yaml(text, params)['preprocess']['source'])}")


def find_presets(folder: Path) -> dict[str, Path]:
    """Give the presets of a folder, by name.

    Raises:
        ParamsError: There is none.
    """
    presets = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if not presets:
        fix = "run from the project's folder, or name another with --folder"
        raise ParamsError(expected="a folder of presets", got="none", where=str(folder), fix=fix)
    return presets


def describe(file: Path) -> str:
    """Give the first line of the comment that opens a preset, empty if it opens with none."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[0].removeprefix("#").strip() if lines and lines[0].startswith("#") else ""


def plan(preset: Path, params: Path) -> tuple[list[Change], str]:
    """Work out what a preset changes; both files stay as they are.

    Returns:
        The changes, in the preset's order, and the text of ``params.yaml`` after them, in which
        only the lines of the changed values differ.

    Raises:
        ParamsError: The preset has an unknown key or a value that no stage accepts, or one of the
            files is not as it should be without the other.
    """
    check_params(read_yaml(params), params)
    text = params.read_text(encoding="utf-8")
    document = _load_with_comments(text, params)
    wanted = list(_flatten(read_yaml(preset)))
    changes = [change for keys, new in wanted if (change := _set(document, keys, new, preset))]
    if changes:
        text = _write_with_comments(document)
        # As the stages will read it: what is refused here never reaches the file.
        check_params(parse_yaml(text, preset), preset)
    return changes, text


def _open_preset(name: str, folder: Path) -> Path:
    presets = find_presets(folder)
    if name not in presets:
        fix = "choose one of them, or write it"
        raise ParamsError(
            expected=f"a preset among {', '.join(presets)}", got=name, where=str(folder), fix=fix
        )
    return presets[name]


def _flatten(settings: dict[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield (keys from the section down, value) of every value that is no mapping."""
    for key, value in settings.items():
        keys = (*above, str(key))
        if isinstance(value, dict):
            yield from _flatten(value, keys)
        else:
            yield keys, value


def _set(document: CommentedMap, keys: tuple[str, ...], new: Any, preset: Path) -> Change | None:
    """Put one value into the document; None if it is there already.

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
    """Give a new list the old one's brackets and comment, which in ruamel.yaml are the list's."""
    if not isinstance(new, list):
        return new
    sequence = CommentedSeq(new)
    old.copy_attributes(sequence)
    return sequence


class _Representer(RoundTripRepresenter):
    """Writes the null that ruamel.yaml would leave empty."""

    def represent_null(self, _: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_null)


def _editor() -> YAML:
    """Give a reader and writer of YAML that keeps comments, order, quotes and long lines."""
    editor = YAML()
    editor.Representer = _Representer
    editor.preserve_quotes = True
    editor.width = 10_000
    return editor


def _load_with_comments(text: str, path: Path) -> CommentedMap:
    """Read settings together with their comments.

    Raises:
        ParamsError: The YAML is refused, such as a key that stands there twice.
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


def _show_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _next_step(source: str) -> str:
    """Say what to do after a preset was applied."""
    if source == "pocket":
        return "dvc repro"
    return f"put the raw files into data/raw/{source} (docs/datasets.md), then dvc repro"


def main() -> None:
    """Run the commands; an error meant for users becomes one line and exit code 1."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()
