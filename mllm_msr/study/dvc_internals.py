"""All that the studies know of DVC's internals; no other module relies on undocumented behaviour.

``dvc exp run --temp`` and ``dvc.api`` are documented. Three things are not:

- the fields of ``dvc exp show --json``, by which finished experiments, refs below ``refs/exps``,
  are found: ``dvc.repo.experiments.show.show``, serialized from ``ExpState``, ``ExpRange`` and
  ``ExpExecutor`` of ``dvc.repo.experiments.serialize``;
- the files that record running experiments, by which the copies of killed ones are removed, which
  no command of DVC's does: ``ExecutorInfo`` of ``dvc.repo.experiments.executor.base``, written by
  ``TempDirQueue`` of ``dvc.repo.experiments.queue.tempdir``;
- the line that DVC prints once the copy is made: ``BaseExecutor.reproduce`` of
  ``dvc.repo.experiments.executor.base``.

Therefore ``pyproject.toml`` has the bound ``dvc>=3.60,<4``. Check them before raising it.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# In the output of dvc exp run, once the workspace is as it was before.
COPY_IS_MADE = b"Reproducing experiment"
EXPERIMENTS = Path(".dvc/tmp/exps")


class Finished(NamedTuple):
    """A finished experiment: its name, its commit, and the content of one metrics file."""

    name: str
    revision: str
    metrics: dict[str, Any]


def find_finished(shown: Sequence[dict[str, Any]], path: str) -> Iterator[Finished]:
    """Yield the finished experiments in the output of ``dvc exp show --json``.

    Args:
        shown: The output, parsed.
        path: The metrics file; experiments without it are left out.
    """
    for experiment in (each for commit in shown for each in commit["experiments"] or ()):
        if experiment["executor"] is None and experiment["revs"]:  # else it is running or failed
            head = experiment["revs"][0]
            metrics = ((head["data"] or {}).get("metrics") or {}).get(path, {}).get("data")
            if metrics:
                yield Finished(experiment["name"], head["rev"], metrics)


def remove_unfinished(name: re.Pattern[str]) -> None:
    """Remove the copies of killed experiments, which DVC would show as running for ever.

    Args:
        name: Matches the whole names of the experiments to remove. None of them may be running.
    """
    parts = ("run", "standalone/run")
    for record in [file for part in parts for file in EXPERIMENTS.glob(f"{part}/*/*.run")]:
        info = json.loads(record.read_text(encoding="utf-8"))
        if name.fullmatch(info["name"] or "") and not info["result_ref"]:
            copy = EXPERIMENTS / "standalone" / Path(info["root_dir"]).name
            shutil.rmtree(copy, ignore_errors=True)
            shutil.rmtree(record.parent)
