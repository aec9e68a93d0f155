"""The experiments of a study: their names, commands and results.

Each is an ordinary ``dvc exp run --temp``: DVC runs it in a copy of the project, and the result is
a commit below ``refs/exps`` with the metrics, and outputs in the cache.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import dvc.api
import yaml
from dvc.exceptions import DvcException

from mllm_msr.core.errors import DataError
from mllm_msr.core.params import read_yaml
from mllm_msr.core.schemas import SAMPLINGS, PerSequence
from mllm_msr.core.tables import read_table
from mllm_msr.ranking import TargetRanks
from mllm_msr.study.dvc_internals import Finished, find_finished
from mllm_msr.study.plans import PARAMS, Study, Variant

METRICS = "data/evaluate/metrics.json"
PER_SEQUENCE = "data/evaluate/per_sequence.parquet"
CANDIDATES = "data/filter_sequences/test_candidates.parquet"
SETTINGS = (PARAMS, "prompts.yaml")
CODE = ("dvc.yaml", "mllm_msr", "stages")  # tracked files, with settings, that decide a result


class Rankings(NamedTuple):
    """The ranks of the test targets at a revision.

    Attributes:
        ranks: By sampling of negatives and scorer.
        candidates: Digest of the candidates; empty if DVC does not track them.
    """

    ranks: dict[tuple[str, str], TargetRanks]
    candidates: str

    @property
    def samplings(self) -> list[str]:
        """Samplings of negatives, in the order of tables."""
        found = {sampling for sampling, _ in self.ranks}
        return [sampling for sampling in SAMPLINGS if sampling in found]


def name_experiments(study: Study) -> dict[str, Variant]:
    """Return the study's variants by the names of their experiments.

    A name ends with a digest of settings, the variant's included, prompts, uncommitted code and raw
    data. The commit is not part of it, because DVC stores experiments by the commit that they start
    from.
    """
    workspace = _read_workspace()
    return {
        f"{study.name}-{variant.name}-{_digest([workspace, dict(variant.settings)])}": variant
        for variant in study.variants
    }


def find_experiments() -> dict[str, Finished]:
    """Return the finished experiments of the checked-out commit by their names."""
    shown = json.loads(_dvc("exp", "show", "--json"))
    return {each.name: each for each in find_finished(shown, METRICS)}


def experiment_command(name: str, settings: Mapping[str, Any]) -> list[str]:
    """Return the command line of an experiment, ``dvc`` first."""
    missing = ["--allow-missing"] if _raw_data() else []
    changes = [f"--set-param={key}={_override(value)}" for key, value in settings.items()]
    return ["dvc", "exp", "run", "--temp", *missing, "--name", name, *changes]


def check_raw_data() -> None:
    """Refuse a study that would read raw files which the copies of the project do not have.

    Experiments run in copies of the files that git and DVC track. Raw files that neither tracks are
    not in them, so the stages that read them must be up to date in the workspace.

    Raises:
        DataError: One of these stages would run again.
    """
    raw = _raw_data()
    changed = json.loads(_dvc("status", "--json", "--with-deps", "fetch_images")) if raw else {}
    if changed:
        expected = "raw files in git or DVC, or the stages up to fetch_images up to date"
        got = f"neither: {', '.join(changed)} would run, in a copy without the files"
        fix = f"dvc add {raw} and git add {raw}.dvc, or dvc repro fetch_images"
        raise DataError(expected=expected, got=got, where=str(raw), fix=fix)


def read_rankings(revision: str) -> Rankings:
    """Read the ranks of the test targets at a revision: a commit or an experiment.

    Raises:
        DataError: There is no such revision, its table is not in the cache, or another version of
            the project wrote it.
    """
    try:
        table = dvc.api.read(PER_SEQUENCE, rev=revision, mode="rb")
        lock = yaml.safe_load(dvc.api.read("dvc.lock", rev=revision))
    except (DvcException, OSError) as error:
        fix = "name a commit or experiment that dvc exp show lists, whose run is in the cache"
        raise DataError(
            expected=f"{PER_SEQUENCE} of that revision", got=str(error), where=revision, fix=fix
        ) from error
    read = lock["stages"]["evaluate"]["deps"]
    digest = next((each["md5"] for each in read if each["path"] == CANDIDATES), "")
    try:
        return Rankings(_parse_ranks(table), digest)
    except DataError as error:
        expected, fix = f"{PER_SEQUENCE} of this version", "run the study again, or dvc repro"
        raise DataError(
            expected=expected, got=f"other content: {error.expected}", where=revision, fix=fix
        ) from error


def read_source(revision: str) -> str:
    """Read ``preprocess.source`` at a revision: a commit or an experiment.

    Raises:
        DataError: There is no such revision, or its settings have no source.
    """
    try:
        settings = yaml.safe_load(dvc.api.read(PARAMS, rev=revision))
        return str(settings["preprocess"]["source"])
    except (DvcException, OSError, KeyError, TypeError) as error:
        fix = "name a commit or experiment that dvc exp show lists"
        expected = f"{PARAMS} of that revision, with preprocess.source"
        raise DataError(expected=expected, got=str(error), where=revision, fix=fix) from error


def check_sources(revisions: Sequence[str]) -> None:
    """Refuse to compare runs of different data.

    Until a run on one's own data is committed, HEAD is still the pocket world's.

    Raises:
        DataError: The revisions' sources differ.
    """
    sources = {revision: read_source(revision) for revision in revisions}
    if len(set(sources.values())) > 1:
        got = ", ".join(f"{source} at {revision}" for revision, source in sources.items())
        fix = "commit your run first (git add params.yaml dvc.lock data, git commit)"
        raise DataError(expected="runs with one preprocess.source", got=got, where=PARAMS, fix=fix)


def describe_other_source(revision: str) -> str:
    """Return a note that a revision's data are not the workspace's; empty if they are."""
    source, here = read_source(revision), read_yaml(Path(PARAMS))["preprocess"]["source"]
    if source == here:
        return ""
    return (
        f"note: these are runs with preprocess.source: {source}; the workspace has {here}."
        " To compare with your own run, commit it first"
    )


def head_commit() -> str:
    """Return the short hash of the checked-out commit, with ``-dirty`` if tracked files differ."""
    return _git("describe", "--always", "--exclude=*", "--dirty").strip()


def python_command(program: str, *arguments: str) -> list[str]:
    """Return the command that runs a program by this interpreter."""
    return [sys.executable, "-m", program, *arguments]


def environment() -> dict[str, str]:
    """Return an environment with this interpreter's programs on the path and unbuffered output."""
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join([here, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def _parse_ranks(table: bytes) -> dict[tuple[str, str], TargetRanks]:
    """Return the test rows of a table PerSequence by sampling and scorer.

    Raises:
        DataError: It breaks its model.
    """
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        path = Path(folder) / "per_sequence.parquet"
        path.write_bytes(table)
        read_table(PerSequence, connection, path, "per_sequence")
        rows = connection.execute(
            "FROM per_sequence WHERE split = 'test' ORDER BY sampling, scorer, sequence"
        ).fetchnumpy()
    keys = list(zip(rows["sampling"], rows["scorer"], strict=True))
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return {
        keys[start]: TargetRanks(
            *(rows[name][start:end] for name in ("sequence", "candidates", "above", "tied"))
        )
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)
    }


def _read_workspace() -> list[Any]:
    """Return all but the variant and the commit that decides a result."""
    settings = [read_yaml(Path(name)) for name in SETTINGS]
    return [settings, _git("diff", "HEAD", "--binary", "--", *CODE), _raw_digest()]


def _digest(decisive: Any) -> str:
    """Return a digest of what decides a result, 8 hexadecimal digits."""
    text = json.dumps(decisive, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _raw_data() -> Path | None:
    """Return the folder of the raw files, or None if a stage writes them or DVC tracks them."""
    source = read_yaml(Path(PARAMS))["preprocess"]["source"]
    raw = Path("data/raw") / source
    return None if source == "pocket" or Path(f"{raw}.dvc").is_file() else raw


def _raw_digest() -> str:
    """Return DVC's digest of raw files that are in no commit, as of the workspace's last run."""
    raw, lock = _raw_data(), Path("dvc.lock")
    if raw is None or not lock.is_file():
        return ""
    read = read_yaml(lock)["stages"].get("preprocess", {}).get("deps", [])
    return next((str(each["md5"]) for each in read if each["path"] == raw.as_posix()), "")


def _override(value: Any) -> str:
    """Format a value as DVC's ``--set-param`` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return f"[{','.join(map(_override, value))}]" if isinstance(value, list) else str(value)


def _dvc(*arguments: str) -> str:
    """Run a command of DVC that only reads, and return its output.

    Raises:
        DataError: It failed.
    """
    return _output_of(python_command("dvc", *arguments))


def _git(*arguments: str) -> str:
    return _output_of(["git", *arguments])


def _output_of(command: list[str]) -> str:
    ended = subprocess.run(  # noqa: S603
        command, env=environment(), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        fix = "run from the folder of a project with a commit"
        raise DataError(
            expected="an answer", got=ended.stderr[-300:], where=" ".join(command), fix=fix
        )
    return ended.stdout
