"""The command line ``mllm-msr``: one subcommand for each module of :data:`SUBCOMMANDS`."""

from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mllm_msr.core.errors import report_errors_on_one_line


class Subcommand(NamedTuple):
    """Where a subcommand is defined.

    Attributes:
        module: The module whose ``app`` has its commands.
        about: Its line in ``mllm-msr --help``.
    """

    module: str
    about: str


SUBCOMMANDS = {
    "presets": Subcommand("mllm_msr.presets", "List, show and apply presets of settings."),
    "baselines": Subcommand("mllm_msr.cli.baselines", "List the baselines and their settings."),
    "evaluate": Subcommand("mllm_msr.cli.evaluate", "Print the metrics of a finished run."),
    "study": Subcommand("mllm_msr.study.__main__", "Run the paper's studies as DVC experiments."),
    "store": Subcommand("mllm_msr.cli.store", "Show, back up and prune the response store."),
    "data": Subcommand("mllm_msr.cli.data", "Check tables that another program wrote."),
    "model": Subcommand("mllm_msr.cli.model", "Import a model from a GGUF file."),
    "recommend": Subcommand("mllm_msr.cli.recommend", "Recommend items to a user or history."),
    "serve": Subcommand("mllm_msr.cli.serve", "Serve recommendations over HTTP."),
    "export": Subcommand(
        "mllm_msr.cli.export", "Write a finished run as a bundle to load elsewhere."
    ),
    "plan": Subcommand("mllm_msr.cli.plan", "Print how many model calls a run still needs."),
    "forget": Subcommand("mllm_msr.cli.forget", "Remove a user's responses from the store."),
}


class _LazyGroup(TyperGroup):
    """A group that imports a subcommand's module only when that subcommand is called.

    ``mllm-msr --help`` and shell completion of a subcommand's name then import no library.
    """

    def resolve_command(
        self, ctx: Any, args: list[str]
    ) -> tuple[str | None, Any | None, list[str]]:
        """Replace the placeholder of a subcommand by its own command or group of commands."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name is None:  # while a shell completes an unknown name
            return name, placeholder, rest
        return name, get_command(import_module(SUBCOMMANDS[name].module).app), rest


app = typer.Typer(
    cls=_LazyGroup,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Multimodal sequential recommendation with multimodal large language models.",
)
for _name, _subcommand in SUBCOMMANDS.items():
    app.add_typer(typer.Typer(), name=_name, help=_subcommand.about)


def main() -> None:
    """Run the command line; a user error or Ctrl-C is printed on one line."""
    with report_errors_on_one_line():
        app(prog_name="mllm-msr")
