"""``mllm-msr serve``: serve recommendations of a finished run over HTTP.

mllm-msr serve --port 8000
"""

from pathlib import Path
from typing import Annotated

import typer

from mllm_msr.cli.run_options import (
    DATA_HELP,
    ProposedItems,
    RetrieverName,
    RunParams,
    RunPrompts,
)
from mllm_msr.core.errors import ModelError, install_command, report_errors_on_one_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    data: Annotated[Path, typer.Argument(help=DATA_HELP)] = Path("data"),
    host: Annotated[
        str, typer.Option(help="Address; one that others reach needs MLLM_MSR_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.", min=0, max=65535)] = 8000,
    timeout: Annotated[
        float, typer.Option(help="The most seconds that an answer may take.", min=0.1)
    ] = 60,
    queue: Annotated[int, typer.Option(help="The most requests that may wait.", min=1)] = 64,
    retriever: RetrieverName = "item_knn",
    candidates: ProposedItems = 100,
    params: RunParams = None,
    prompts: RunPrompts = None,
) -> None:
    """Serve a finished run or a bundle: a page at /, recommendations and rankings, metrics.

    Example: mllm-msr serve --port 8000
    """
    try:
        from mllm_msr.serving.server import Run  # loads torch
        from mllm_msr.serving.server import serve as serve_run
    except ModuleNotFoundError as error:
        if error.name not in {"fastapi", "prometheus_client", "uvicorn"}:
            raise
        raise ModelError(
            expected="the packages of the extra serve",
            got=f"no {error.name}",
            where="mllm-msr serve",
            fix=install_command("serve"),
        ) from error
    run = Run(data, params, prompts, retriever, candidates)
    serve_run(run, host, port, seconds=timeout, longest_queue=queue)


def main() -> None:
    """Run the command."""
    with report_errors_on_one_line():
        app()


if __name__ == "__main__":
    main()
