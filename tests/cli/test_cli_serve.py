"""``mllm-msr serve``: its options, and what it says before a model is loaded."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mllm_msr.cli.serve import app
from mllm_msr.core.errors import ModelError

ROOT = Path(__file__).parents[2]


def test_the_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "mllm_msr.serving.server.serve", lambda *given, **named: asked.append((given, named))
    )
    result = CliRunner().invoke(app, ["--port", "0", "--timeout", "5", "--queue", "3"])
    assert result.exit_code == 0, result.output
    (run, host, port), named = asked[0]
    assert (host, port, named) == ("127.0.0.1", 0, {"seconds": 5, "longest_queue": 3})
    assert (run.data, run.retriever, run.candidates) == (Path("data"), "item_knn", 100)


@pytest.mark.slow
def test_a_port_in_use_is_one_line_and_exit_code_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "mllm_msr.cli", "serve", "--port", str(port)],
            cwd=ROOT,
            env=os.environ,
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"error: 127.0.0.1 port {port}: expected an address and a port")


def test_the_help_imports_neither_torch_nor_fastapi() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mllm_msr.cli import app;"
        "shown = CliRunner().invoke(app, ['serve', '--help']).output; assert '--queue' in shown;"
        "print(sys.modules.keys() & {'torch', 'transformers', 'fastapi', 'uvicorn'})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "set()"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "mllm_msr.serving.server":
            raise ModuleNotFoundError(f"No module named {name}", name="uvicorn")
        return imported(name, *rest, **named)

    import builtins

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModelError, match=r"no uvicorn; pip install -c .* -e '\.\[serve\]'"):
        CliRunner().invoke(app, [], catch_exceptions=False)
