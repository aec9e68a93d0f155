"""Options of the commands that load a finished run or a bundle."""

from pathlib import Path
from typing import Annotated

import typer

DATA_HELP = "Folder of the stages' outputs, or a bundle of mllm-msr export."

RetrieverName = Annotated[
    str, typer.Option(help="First stage: popularity, or a baseline that learns.")
]
ProposedItems = Annotated[
    int, typer.Option(help="How many items the retriever proposes for the model to rank.")
]
RunParams = Annotated[
    Path | None,
    typer.Option(help="Settings of the run.", show_default="params.yaml, or the bundle's"),
]
RunPrompts = Annotated[
    Path | None,
    typer.Option(help="Prompts of the run.", show_default="prompts.yaml, or the bundle's"),
]
