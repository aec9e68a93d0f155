"""The rankings of an experiment, read from DVC: by sampling and scorer, of test only."""

import io
from typing import Any

import dvc.api
import pyarrow as arrow
import pyarrow.parquet
import pytest
import yaml

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import PerSequence
from mllm_msr.core.tables import arrow_schema
from mllm_msr.study import experiments, plans
from mllm_msr.study.experiments import CANDIDATES, name_experiments, read_rankings

LOCK = {"stages": {"evaluate": {"deps": [{"path": CANDIDATES, "md5": "abc"}]}}}
ROWS = [
    {"sampling": sampling, "sequence": sequence, "split": split, "scorer": scorer}
    | {"candidates": 5, "above": sequence % 4, "tied": int(sampling == "targets")}
    for sampling, left_out in (("targets", 2), ("uniform", None))
    for scorer in ("MLLM-MSR", "popularity")
    for sequence, split in ((3, "test"), (1, "valid"), (2, "test"), (0, "test"))
    if sequence != left_out
]


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make DVC return the table of these rows for every revision."""

    def keep_table(table: arrow.Table) -> None:
        file = io.BytesIO()
        arrow.parquet.write_table(table, file)
        kept = {"dvc.lock": yaml.safe_dump(LOCK)}
        monkeypatch.setattr(dvc.api, "read", lambda path, **_: kept.get(path, file.getvalue()))

    return keep_table


def test_rankings_are_read_by_sampling_and_scorer(keep):
    keep(arrow.Table.from_pylist(ROWS, schema=arrow_schema(PerSequence)))
    ranked = read_rankings("abc")
    assert ranked.candidates == "abc"
    assert ranked.samplings == ["uniform", "targets"]
    assert len(ranked.ranks) == 4
    for (sampling, _), found in ranked.ranks.items():
        sequences = [0, 2, 3] if sampling == "uniform" else [0, 3]
        assert found.sequences.tolist() == sequences
        assert found.above.tolist() == [sequence % 4 for sequence in sequences]
        assert set(found.tied.tolist()) == {int(sampling == "targets")}


def test_rankings_of_an_earlier_version_are_refused(keep):
    earlier = [{name: value for name, value in row.items() if name != "sampling"} for row in ROWS]
    keep(arrow.Table.from_pylist(earlier))
    with pytest.raises(DataError, match=r"abc: expected .*per_sequence\.parquet of this") as caught:
        read_rankings("abc")
    assert str(caught.value).endswith("run the study again, or dvc repro")
    assert "\n" not in str(caught.value)


def test_experiments_of_other_settings_have_other_names(monkeypatch):
    monkeypatch.setattr(experiments, "_read_workspace", list)
    params = {"baselines": {"models": ["sasrec"]}, "feature_baselines": {"models": []}}
    three, five = (name_experiments(plans.plan_folds(params, count)) for count in (3, 5))
    assert not three.keys() & five.keys()
    own, other = (name_experiments(plans.plan_table(model)) for model in (None, "a/model"))
    shared = {variant.name for name, variant in own.items() if name in other}
    assert shared == {"full", "zero-shot"}


def test_documentation_decides_no_result(monkeypatch):
    asked = []
    monkeypatch.setattr(experiments, "_git", lambda *words: asked.append(words) or "")
    name_experiments(plans.ABLATION)
    ((*command, dvc_yaml, package, stages),) = asked
    assert command == ["diff", "HEAD", "--binary", "--"]
    assert (dvc_yaml, package, stages) == ("dvc.yaml", "mllm_msr", "stages")
