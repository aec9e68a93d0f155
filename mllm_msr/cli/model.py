"""``mllm-msr model``: import a model from a file of another format.

mllm-msr model import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m-instruct
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.core.errors import report_errors_on_one_line

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Import models from files of other formats.",
)


class Dtype(StrEnum):
    """Dtypes of saved weights."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@app.callback()
def _group() -> None:
    """Keep the name of the command; Typer drops that of an only one."""


@app.command("import")
def import_model(
    source: Annotated[Path, typer.Argument(help="A GGUF file of Llama, Mistral, Qwen2 or Qwen3.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; a new one.")],
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the written weights.")] = Dtype.BFLOAT16,
) -> None:
    """Write a GGUF file's model as a folder of safetensors that every stage loads.

    The weights are dequantized, which restores no precision. Weights, tokenizer, chat template and
    logits of the folder are compared with those of the file before the folder appears.

    Example: mllm-msr model import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m-instruct
    """
    from mllm_msr.importing.gguf import DTYPES, import_gguf

    imported = import_gguf(source, folder, DTYPES[dtype.value])
    typer.echo(str(imported.source))
    typer.echo(f"SHA-256 {imported.source.sha256}")
    typer.echo(
        f"wrote {folder}: {imported.size / 1e6:,.1f} MB in {imported.dtype}; logits differ from the"
        f" file's by {imported.logits_difference:.1e} at most, relative to their norm"
    )


def main() -> None:
    """Run the commands."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()
