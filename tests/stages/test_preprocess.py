"""The stage preprocess: its tables, counts of dropped rows, and errors."""

import json
from pathlib import Path

import pytest

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import ImageSources, Interactions, Items
from mllm_msr.core.tables import read_rows
from mllm_msr.data.sources.tables import DEFAULT_LAYOUT
from stages.preprocess import preprocess

PROJECT = Path(__file__).parents[2]
TABLES = ["dropped.json", "image_sources.parquet", "interactions.parquet", "items.parquet"]


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "interactions.csv").write_text(
        "user,item,timestamp\nann,1,1700000000000\nbob,2,1700000000000\nbob,2,1700000000001\n"
    )
    (folder / "items.csv").write_text(
        "item,title,image\n1,Red kettle,images/1.png\n2,Blue teapot,https://example.org/2.jpg\n"
    )
    return folder


@pytest.fixture
def params(tmp_path):
    return write_params(tmp_path)


def write_params(folder: Path, **changes: str) -> Path:
    values = {"source": "tables", "unknown_items": "error", "allow_pocket_model": "false"} | changes
    values["microlens"] = "{covers: required}"
    values["amazon"] = (
        "{category: Things, min_rating: 0, verified_only: false, bad_records: drop,"
        " text_length: 99, image_size: large}"
    )
    values["tables"] = json.dumps(DEFAULT_LAYOUT.model_dump())
    lines = "".join(f"  {key}: {value}\n" for key, value in values.items())
    path = folder / "params.yaml"
    path.write_text(f"preprocess:\n{lines}")
    return path


@pytest.fixture
def call(run_stage):
    return lambda *options: run_stage("preprocess", *options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_command_writes_three_tables(raw, params, tmp_path, call):
    out = tmp_path / "out"
    result = call("--raw", raw, "--out", out, "--params", params)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "dropped 0 interactions with unknown items",
        "dropped 0 users left without interactions",
        "dropped 0 items left without interactions",
        "dropped 0 images of unknown items",
        "dropped 1 repeated interactions",
        f"wrote {out}: 2 interactions, 2 items, 2 images",
    ]
    assert names(out) == TABLES
    users = read_rows(Interactions, out / "interactions.parquet", "user")
    assert [row["user"] for row in users] == ["ann", "bob"]
    assert [row["title"] for row in read_rows(Items, out / "items.parquet", "item")] == [
        "Red kettle",
        "Blue teapot",
    ]
    assert list(read_rows(ImageSources, out / "image_sources.parquet", "item")) == [
        {"item": "1", "file": f"{raw}/images/1.png", "member": None, "url": None},
        {"item": "2", "file": None, "member": None, "url": "https://example.org/2.jpg"},
    ]


def test_equal_raw_files_give_equal_tables(raw, params, tmp_path):
    for out in ("one", "two"):
        preprocess(raw, tmp_path / out, params)
    for name in TABLES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_raw_folder_is_named_after_the_source(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^data/raw/tables: expected one interactions\.csv"):
        preprocess(out=tmp_path / "out", params=params)


def test_missing_raw_files_in_an_experiment_are_an_error_with_the_fix(
    params, tmp_path, monkeypatch
):
    copied = tmp_path / ".dvc/tmp/exps/standalone/tmpabc"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    with pytest.raises(
        DataError, match=r"dvc add data/raw/tables and git add data/raw/tables\.dvc"
    ):
        preprocess(out=copied / "out", params=params)
    assert not (copied / "out").exists()


def test_bad_input_is_a_one_line_error_and_keeps_earlier_tables(raw, params, tmp_path, call):
    out = tmp_path / "out"
    preprocess(raw, out, params)
    before = {name: (out / name).read_bytes() for name in TABLES}
    (raw / "interactions.csv").write_text("user,item,timestamp\nann,1,1700000000\n")
    result = call("--raw", raw, "--out", out, "--params", params)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {raw}/interactions.csv, row 1, timestamp: expected integer milliseconds since"
        " 1970, before 2100; got '1700000000'; these look like seconds (2023-11-14), set"
        " preprocess.tables.timestamp_unit to seconds\n"
    )
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_debug_lets_the_error_through(raw, params, tmp_path, call):
    (raw / "items.csv").unlink()
    with pytest.raises(DataError):
        call("--raw", raw, "--out", tmp_path / "out", "--params", params, "--debug")


def test_dropped_rows_are_counted_by_reason(raw, tmp_path, capsys):
    with (raw / "interactions.csv").open("a") as stream:
        stream.write("cleo,99,1700000000000\n")
    params = write_params(tmp_path, unknown_items="drop")
    preprocess(raw, tmp_path / "out", params)
    assert json.loads((tmp_path / "out" / "dropped.json").read_text()) == {
        "interactions_with_unknown_items": 1,
        "users_left_without_interactions": 1,
        "items_left_without_interactions": 1,
        "images_of_unknown_items": 0,
        "repeated_interactions": 1,
    }
    assert "dropped 1 interactions with unknown items\n" in capsys.readouterr().out


def test_rows_dropped_by_the_reader_are_counted(tmp_path, capsys):
    record = {"user_id": "ann", "parent_asin": "B1", "timestamp": 1700000000000, "rating": 5.0}
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "Things.jsonl").write_text(f"{json.dumps(record)}\nbroken\n")
    (raw / "meta_Things.jsonl").write_text('{"parent_asin": "B1", "title": "Red kettle"}\n')
    preprocess(raw, tmp_path / "out", write_params(tmp_path, source="amazon"))
    dropped = json.loads((tmp_path / "out" / "dropped.json").read_text())
    assert dropped["reviews_with_bad_json"] == 1
    assert dropped["repeated_interactions"] == 0
    assert capsys.readouterr().out.startswith("dropped 1 reviews with bad json\n")


def test_a_full_disk_is_a_one_line_error_and_keeps_earlier_tables(
    raw, params, tmp_path, run_stage_on_a_full_disk
):
    out = tmp_path / "out"
    preprocess(raw, out, params)
    before = {name: (out / name).read_bytes() for name in TABLES}
    result = run_stage_on_a_full_disk(
        "preprocess", "--raw", raw, "--out", out, "--params", params, limit=400
    )
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    assert "got a full disk; free some space" in result.stderr
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_leftovers_of_a_killed_run_are_removed(raw, params, tmp_path):
    out = tmp_path / "out"
    (out / ".unfinished.0.tmp" / "unfinished").mkdir(parents=True)
    (out / ".unfinished.0.tmp" / "unfinished" / "old.parquet").touch()
    (out / ".gitignore").write_text("/items.parquet\n")
    preprocess(raw, out, params)
    assert names(out) == [".gitignore", *TABLES]


def test_text_alone_is_enough(raw, params, tmp_path, capsys):
    (raw / "items.csv").write_text("item,title\n1,Red kettle\n2,Blue teapot\n")
    preprocess(raw, tmp_path / "out", params)
    assert capsys.readouterr().out.endswith("2 interactions, 2 items, 0 images\n")


def test_prepared_tables_are_written_as_they_are_and_checked_first(raw, tmp_path):
    preprocess(raw=raw, out=tmp_path / "first", params=write_params(tmp_path))
    prepared = tmp_path / "prepared"
    (tmp_path / "first").rename(prepared)
    (prepared / "image_sources.parquet").unlink()
    params = write_params(tmp_path, source="prepared")
    preprocess(raw=prepared, out=tmp_path / "second", params=params)
    for model, order in ((Interactions, '"user", position'), (Items, "item")):
        first, second = (
            list(read_rows(model, folder / f"{model.__name__.lower()}.parquet", order))
            for folder in (prepared, tmp_path / "second")
        )
        assert first
        assert first == second
    assert json.loads((tmp_path / "second/dropped.json").read_text()) == {}
    (prepared / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"got items: no file items.parquet .* data check"):
        preprocess(raw=prepared, out=tmp_path / "third", params=params)
