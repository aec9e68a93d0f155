"""Stages that are killed at random moments and run again.

    python -m bench.faults --kills 20

Each stage of a small pocket world is run undisturbed once, and then killed with SIGKILL at moments
drawn uniformly over the duration of that run, each time from a clean state, and run again. One JSON
line per stage counts the reruns that end with the bytes of the undisturbed run, the files that a
kill left under their names without these bytes, the temporary folders that a rerun left, the stored
responses that a rerun asked again, and the prompts that a killed run had begun and not stored,
which the rerun has to ask a second time.

All processes are forked from this one, which has imported torch and the rest: a run then takes
seconds, and no kill falls into imports, where nothing can break. Decoding has few slots, and
``sft`` saves a checkpoint after every step, so that there is something to resume in so small a run.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Annotated, Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import torch
import transformers
import typer
import yaml

from mllm_msr.core.command import run
from mllm_msr.engines import decoding
from mllm_msr.engines.decoding import Decoder
from mllm_msr.engines.response_store import VARIABLE
from mllm_msr.method.scoring import ScoringModel
from mllm_msr.training import finetuning
from mllm_msr.training.files import CURVES

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "mllm_msr/pocket/model")
EPOCHS = 5  # of a baseline that learns
SETTINGS: dict[str, dict[str, Any]] = {
    "pocket_world": {"users": 40, "items": 60},
    "filter_sequences": {
        "min_user_interactions": 3,
        "valid_negatives": 5,
        "test_negatives": 5,
        "valid_share": 0.2,
        "test_share": 0.2,
        "evaluation_sampling": ["uniform"],
    },
    "summarize_items": {"model": MODEL},
    "infer_preferences": {"model": MODEL},
    "encode_items": {"model": MODEL},
    "recommender": {"model": MODEL},
    "sft": {"epochs": 2, "batch_size": 16, "validation_sequences": 8},
    "baselines": {"models": ["item_knn", "sasrec"]},
    "feature_baselines": {"models": ["gru4rec_f"]},
    "text_baselines": {"models": ["word_overlap"]},
    "retrieve": {"retriever": "item_knn", "candidates": 10},
    "evaluate": {"bootstrap_samples": 200},
}
# In the pipeline's order: stages read what those before them wrote.
RUNS = (
    ("pocket_world",),
    ("preprocess",),
    ("filter_sequences",),
    ("fetch_images",),
    ("summarize_items",),
    ("encode_items",),
    ("infer_preferences",),
    ("sft",),
    ("score",),
    ("baselines", "item_knn"),
    ("baselines", "sasrec"),
    ("feature_baselines", "gru4rec_f"),
    ("text_baselines", "word_overlap"),
    ("retrieve",),
    ("rerank",),
    ("evaluate",),
    ("report",),
)
SLOTS = 8  # of decoding; the usual number would take all items of the small world at once
# Curves grow while a training runs; they are complete once it has ended.
GROWING = {f"data/sft/curves/plots/metrics/{name}.tsv" for name in CURVES.values()} | {
    "data/sft/curves/metrics.json"
}
STORE, BEGUN = Path(".mllm_msr/responses.sqlite"), Path(".mllm_msr/begun")
LOG_ODDS, LAST_DIGITS = "log_odds", 1e-5  # other prompts share a batch after a kill
ATTEMPTS = 10  # to kill a run before it ends
# Imported by stages when they run.
IMPORTED = (
    "mllm_msr.baselines.feature_extraction",
    "mllm_msr.baselines.learning.sequential",
    "mllm_msr.baselines.task",
    "mllm_msr.core.schemas",
    "mllm_msr.evaluation.evaluation",
    "mllm_msr.images.gallery",
    "mllm_msr.recommendation.full_catalogue",
    "ibis",
    "pandera.ibis",
)


class Ended(NamedTuple):
    """A run that ended.

    Attributes:
        code: The exit code; negative: the signal that killed it.
        seconds: Its duration.
        output: What it printed.
    """

    code: int
    seconds: float
    output: str


class Undisturbed(NamedTuple):
    """A run that was not killed.

    Attributes:
        files: Its output files, by path.
        asked: How many prompts it put to the model.
        seconds: Its duration.
    """

    files: dict[str, bytes]
    asked: int
    seconds: float

    def other_files(self) -> list[str]:
        """Return the output files that are missing or have other bytes now."""
        return [name for name, content in self.files.items() if read(Path(name)) != content]

    def is_equal_but_for_last_digits(self) -> bool:
        """Return whether only log-odds differ from this run's, and in their last digits alone."""
        return all(
            Path(name).is_file() and differ_in_last_digits(content, Path(name).read_bytes())
            for name, content in self.files.items()
            if name in self.other_files()
        )

    def clean(self) -> None:
        """Remove the outputs, temporary folders and the state directory."""
        for name in self.files:
            Path(name).unlink(missing_ok=True)
        for folder in (*Path("data").rglob(".*.tmp"), Path(".mllm_msr")):
            shutil.rmtree(folder, ignore_errors=True)


class Rerun(NamedTuple):
    """A run that was killed, and the one after it.

    Attributes:
        equal: Whether the second ended with the bytes of an undisturbed run.
        nearly: Whether it did but for the last digits of log-odds.
        half: Files that the kill left under their names, other than those of an undisturbed run.
        leftovers: Temporary folders that the second run left.
        stored: Responses that the killed run had stored.
        wasted: Prompts that the second run asked although their responses were stored.
        twice: Prompts that the killed run had begun and not stored.
    """

    equal: bool
    nearly: bool
    half: list[str]
    leftovers: list[str]
    stored: int
    wasted: int
    twice: int


def main(
    kills: Annotated[int, typer.Option(help="Of each stage.")] = 20,
    stage: Annotated[list[str] | None, typer.Option(help="Kill these only.")] = None,
    until: Annotated[str, typer.Option(help="The last stage that runs.")] = RUNS[-1][0],
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Print one JSON line per stage."""
    names = [words[0] for words in RUNS]
    for name in [*(stage or []), until]:
        if name not in names:
            raise typer.BadParameter(f"{name} is none of {', '.join(dict.fromkeys(names))}")
    import_everything()
    folder = mkdtemp()  # a TemporaryDirectory would be removed when the first forked process exits
    try:
        with contextlib.chdir(folder):
            write_settings()
            os.environ["DVC_ROOT"] = folder
            os.environ.pop(VARIABLE, None)
            last = len(names) - names[::-1].index(until)
            for number, words in enumerate(RUNS[:last]):
                chosen = not stage or words[0] in stage
                rng = np.random.default_rng([seed, number])
                result = kill_often(words, kills if chosen else 0, rng)
                if chosen:
                    typer.echo(json.dumps(result))
    finally:
        shutil.rmtree(folder)


def kill_often(words: Sequence[str], kills: int, rng: np.random.Generator) -> dict[str, Any]:
    """Run a stage undisturbed; then kill it and run it again, each time from a clean state.

    Args:
        words: The stage and its arguments.
        kills: How often.
        rng: Draws the moments.

    Returns:
        The counts.
    """
    whole = run_undisturbed(words)
    reruns = [kill_once(words, whole, rng) for _ in range(kills)]
    return {
        "stage": " ".join(words),
        "seconds": round(whole.seconds, 1),
        "kills": len(reruns),
        "equal": sum(rerun.equal for rerun in reruns),
        "equal_but_for_last_digits": sum(rerun.nearly for rerun in reruns),
        "half_files": sorted({name for rerun in reruns for name in rerun.half}),
        "leftovers": sorted({name for rerun in reruns for name in rerun.leftovers}),
        "prompts": whole.asked,
        "stored_at_the_kill": sorted(rerun.stored for rerun in reruns) if whole.asked else [],
        "stored_but_asked_again": sum(rerun.wasted for rerun in reruns),
        "asked_twice_at_most": max((rerun.twice for rerun in reruns), default=0),
    }


def run_undisturbed(words: Sequence[str]) -> Undisturbed:
    """Run a stage that has no outputs yet."""
    before = set(list_outputs())
    ended = check(execute(words))
    files = {name: Path(name).read_bytes() for name in list_outputs() if name not in before}
    shutil.rmtree(".mllm_msr", ignore_errors=True)
    return Undisturbed(files, count_asked(ended.output), ended.seconds)


def kill_once(words: Sequence[str], whole: Undisturbed, rng: np.random.Generator) -> Rerun:
    """Kill a stage at a random moment, and run it again.

    Raises:
        RuntimeError: It ended before the kill each time, or the second run failed.
    """
    for _ in range(ATTEMPTS):
        whole.clean()
        if execute(words, kill_after=rng.uniform(0, whole.seconds)).code == -signal.SIGKILL:
            break
    else:
        raise RuntimeError(f"{words} ended before each of {ATTEMPTS} kills")
    half = [name for name in whole.other_files() if Path(name).is_file() and name not in GROWING]
    stored, begun = count_stored(), count_begun()
    second = check(execute(words))
    equal = not whole.other_files()
    return Rerun(
        equal=equal,
        nearly=equal or whole.is_equal_but_for_last_digits(),
        half=half,
        leftovers=[str(path) for path in Path("data").rglob(".*.tmp")],
        stored=stored,
        wasted=count_asked(second.output) - (whole.asked - stored),
        twice=begun - stored,
    )


def execute(words: Sequence[str], kill_after: float | None = None, counting: bool = True) -> Ended:
    """Run a stage in a forked process.

    Args:
        words: The stage and its arguments.
        kill_after: Seconds after which it is killed, unless it has ended.
        counting: Whether to count its prompts, in the state directory.
    """
    with TemporaryFile("w+") as output:
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            if counting:
                count_prompts()
            run_stage(words, output.fileno())
        code = wait(process, kill_after)
        output.seek(0)
        return Ended(code, time.monotonic() - start, output.read())


def run_stage(words: Sequence[str], output: int) -> NoReturn:
    """Run a stage in this process and end it."""
    name, *arguments = words
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    sys.argv = [f"stages.{name}", *arguments]
    run(getattr(import_module(f"stages.{name}"), name))
    os._exit(1)  # never reached: run ends the process


def wait(process: int, kill_after: float | None) -> int:
    """Wait for a process, kill it where that is asked, and return its exit code."""
    stop = math.inf if kill_after is None else time.monotonic() + kill_after
    while time.monotonic() < stop:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def count_prompts() -> None:
    """Let this process write a byte to a file for each prompt that it begins to compute."""
    for owner, method, argument in ((Decoder, "_prefill", 1), (ScoringModel, "score_batch", 1)):
        original = getattr(owner, method)

        @functools.wraps(original)
        def begin(*arguments: Any, original: Any = original, argument: int = argument) -> Any:
            with BEGUN.open("ab") as file:
                file.write(bytes(len(arguments[argument])))
            return original(*arguments)

        setattr(owner, method, begin)


def count_begun() -> int:
    """Return how many prompts the last run began to compute."""
    return BEGUN.stat().st_size if BEGUN.is_file() else 0


def count_stored() -> int:
    """Return the number of responses that a killed run stored."""
    if not STORE.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(STORE)) as database:
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return int(database.execute("SELECT count(*) FROM answers").fetchone()[0]) if tables else 0


def count_asked(output: str) -> int:
    """Return how many prompts a stage says that it put to the model."""
    asked = re.search(r"asked ([\d,]+)", output)
    return int(asked[1].replace(",", "")) if asked else 0


def list_outputs() -> list[str]:
    """Return the paths of all files below data."""
    return sorted(str(path) for path in Path("data").rglob("*") if path.is_file())


def read(path: Path) -> bytes | None:
    """Return the content of a file, None where there is none."""
    return path.read_bytes() if path.is_file() else None


def differ_in_last_digits(first: bytes, second: bytes) -> bool:
    """Return whether two files are tables that differ in the last digits of log-odds only."""
    try:
        tables = [arrow.parquet.read_table(arrow.BufferReader(one)) for one in (first, second)]
        (one, other), others = (
            [table[LOG_ODDS].to_numpy() for table in tables],
            [table.drop_columns(LOG_ODDS) for table in tables],
        )
    except (arrow.ArrowInvalid, KeyError):
        return False
    return others[0].equals(others[1]) and bool(np.allclose(one, other, rtol=0, atol=LAST_DIGITS))


def check(ended: Ended) -> Ended:
    """Return a run that succeeded.

    Raises:
        RuntimeError: It failed.
    """
    if ended.code:
        raise RuntimeError(f"exit code {ended.code}: {ended.output}")
    return ended


def import_everything() -> None:
    """Import what stages import, and set what makes a small run resumable."""
    for words in RUNS:
        import_module(f"stages.{words[0]}")
    for name in IMPORTED:
        import_module(name)
    torch.set_num_threads(1)
    decoding.SLOTS = SLOTS
    finetuning.CHECKPOINT_SECONDS = 0
    transformers.utils.logging.disable_progress_bar()


def write_settings() -> None:
    """Write settings and prompts into the current folder."""
    settings = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, changes in SETTINGS.items():
        settings[section] |= changes
    for section in ("baselines", "feature_baselines"):
        for model in settings[section]["models"]:
            if "epochs" in settings[section][model]:
                settings[section][model]["epochs"] = EPOCHS
    Path("params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    shutil.copy(ROOT / "prompts.yaml", "prompts.yaml")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
