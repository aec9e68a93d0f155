"""The stage filter_sequences: its tables, errors, and statistics of the real release."""

import json
import sys
from pathlib import Path

import duckdb
import pytest
import yaml
from measuring import measured

from mllm_msr.core.tables import count_rows, read_rows
from mllm_msr.data.candidates import TABLES as CANDIDATES
from mllm_msr.data.sequences import CATALOGUE_TABLES
from mllm_msr.data.sequences import TABLES as SEQUENCES

PROJECT = Path(__file__).parents[2]
REAL = PROJECT.parent / "shared" / "data" / "microlens"
TABLES = SEQUENCES | CANDIDATES | CATALOGUE_TABLES
FILES = sorted([*(f"{name}.parquet" for name in TABLES), "statistics.json"])


@pytest.fixture
def folder(tmp_path):
    """Tables as preprocess writes them: 60 users with 6 of 40 items each, and a few rare items."""
    with duckdb.connect() as connection:
        connection.execute(
            """
            CREATE TABLE interactions AS
            SELECT 'u' || user AS user, 'i' || (user * 7 + step * 5) % 40 AS item,
                   1700000000000 + step * 1000 + user AS timestamp, user * 6 + step AS position
            FROM range(60) AS users (user), range(6) AS steps (step)
            UNION ALL SELECT 'once', 'i1', 1700000000000, 999
            UNION ALL SELECT 'u1', 'rare', 1700000009999, 1000
            """
        )
        connection.execute(
            "CREATE TABLE items AS"
            " SELECT DISTINCT item, item AS title, NULL::VARCHAR AS description FROM interactions"
        )
        connection.execute(
            "CREATE TABLE image_sources AS SELECT item, 'images/' || item AS file,"
            " NULL::VARCHAR AS member, NULL::VARCHAR AS url FROM items"
        )
        for table in ("interactions", "items", "image_sources"):
            connection.sql(f"FROM {table}").write_parquet(str(tmp_path / f"{table}.parquet"))
    write_params(tmp_path)
    return tmp_path


def write_params(folder, **changes):
    section = yaml.safe_load((PROJECT / "params.yaml").read_text())["filter_sequences"]
    section["evaluation_sampling"] = ["uniform"]  # six targets are too few to draw twenty from
    section |= {"min_item_interactions": 5} | changes
    (folder / "params.yaml").write_text(yaml.safe_dump({"filter_sequences": section}))


def options(folder):
    words = []
    for table in ("interactions", "items", "image_sources"):
        words += [f"--{table.replace('_', '-')}", str(folder / f"{table}.parquet")]
    return [*words, "--params", str(folder / "params.yaml"), "--out", str(folder / "out")]


@pytest.fixture
def call(run_stage):
    return lambda folder, *more: run_stage("filter_sequences", *options(folder), *more)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def test_the_command_writes_its_files(folder, call):
    result = call(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "dropped 1 interactions of rare users",
        "dropped 1 interactions of rare items",
        "dropped 0 sequences with short history",
        f"wrote {folder / 'out'}: 60 sequences, 570 candidates, 40 items",
    ]
    assert list(contents(folder)) == FILES
    for name, (model, _) in TABLES.items():
        assert list(read_rows(model, folder / "out" / f"{name}.parquet", "1"))
    assert count_rows(folder / "out" / "train_candidates.parquet") == 48 * 4
    assert count_rows(folder / "out" / "test_candidates.parquet") == 6 * 21


def test_the_command_says_how_many_sequences_a_budget_uses(folder, call):
    write_params(folder, budget={"train": 10, "valid": None, "test": 100, "interactions": "used"})
    result = call(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-3:] == [
        "used 10 of 48 train sequences",
        "used 6 of 6 test sequences, fewer than the budget of 100",
        f"wrote {folder / 'out'}: 60 sequences, 418 candidates, 40 items",
    ]
    statistics = json.loads(contents(folder)["statistics.json"])
    assert statistics["used_sequences"] == {"train": 10, "valid": 6, "test": 6}


def test_statistics_are_numbers_only(folder, call):
    call(folder)
    assert json.loads(contents(folder)["statistics.json"]) == {
        "users": 60,
        "items": 40,
        "interactions": 360,
        "average_length": 6.0,
        "sparsity": 0.85,
        "sequences": {"train": 48, "valid": 6, "test": 6},
        "used_sequences": {"train": 48, "valid": 6, "test": 6},
        "test_strata": {"cold": 0, "rare": 0, "warm": 6},
        "withheld_items": 0,
        "targets_tied_in_time": 0,
        "dropped": {
            "interactions_of_rare_users": 1,
            "interactions_of_rare_items": 1,
            "sequences_with_short_history": 0,
        },
    }


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes(folder, call):
    call(folder)
    first = contents(folder)
    call(folder)
    assert contents(folder) == first
    write_params(folder, test_negatives=30)
    call(folder)
    changed = [name for name, data in contents(folder).items() if data != first[name]]
    assert changed == ["test_candidates.parquet"]


@pytest.mark.slow
def test_another_sampling_only_adds_candidates(folder, call):
    write_params(folder, valid_share=0.4, test_share=0.4, valid_negatives=10, test_negatives=10)
    call(folder)
    first = contents(folder)
    both = ["uniform", "targets"]
    write_params(
        folder,
        **{"valid_share": 0.4, "test_share": 0.4, "valid_negatives": 10, "test_negatives": 10},
        evaluation_sampling=both,
    )
    result = call(folder)
    assert result.returncode == 0, result.stderr
    changed = [name for name, data in contents(folder).items() if data != first[name]]
    assert set(changed) - {"statistics.json"} == {
        "test_candidates.parquet",
        "valid_candidates.parquet",
    }
    for split in ("valid", "test"):
        now = duckdb.sql(f"FROM '{folder}/out/{split}_candidates.parquet'").fetchall()
        (folder / "before.parquet").write_bytes(first[f"{split}_candidates.parquet"])
        before = duckdb.sql(f"FROM '{folder}/before.parquet'").fetchall()
        assert [row for row in now if row[0] == "uniform"] == before
        assert len(now) > len(before)


def test_targets_tied_in_time_are_counted(folder, call):
    path = folder / "interactions.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE t AS FROM '{path}'")
        # The last two of u2 and of u3, and the first two of u4, have the same time.
        connection.execute(
            """UPDATE t SET timestamp = 1800000000000 WHERE "user" IN ('u2', 'u3')
               AND position % 6 >= 4"""
        )
        connection.execute(
            """UPDATE t SET timestamp = 1600000000000 WHERE "user" = 'u4' AND position % 6 < 2"""
        )
        connection.sql("FROM t").write_parquet(str(path))
    call(folder)
    assert json.loads(contents(folder)["statistics.json"])["targets_tied_in_time"] == 2


def test_skipped_sequences_are_counted(folder, call):
    write_params(folder, test_share=0.5, test_negatives=15, evaluation_sampling=["targets"])
    call(folder)
    statistics = json.loads(contents(folder)["statistics.json"])
    asked = duckdb.sql(
        f"SELECT count(DISTINCT sequence) FROM '{folder}/out/test_candidates.parquet'"
    ).fetchall()
    left_out = statistics["dropped"].get("test_sequences_without_enough_targets_negatives", 0)
    assert asked == [(statistics["sequences"]["test"] - left_out,)]


def test_candidates_are_in_the_catalogue_and_untouched(folder, call):
    call(folder)
    stray = duckdb.sql(
        f"""
        SELECT count(*) FILTER (label), count(*) FILTER (NOT label AND touched.item IS NOT NULL)
        FROM read_parquet('{folder}/out/*_candidates.parquet') AS asked
        JOIN '{folder}/out/sequences.parquet' USING (sequence)
        LEFT JOIN '{folder}/interactions.parquet' AS touched
          ON touched.user = sequences.user AND touched.item = asked.item
        """
    ).fetchall()
    # The six validation sequences have two sets of candidates, valid and selection.
    assert stray == [(60 + 6, 0)]


def change(folder, table, query):
    """Replace a table by the result of a query on it."""
    path = folder / f"{table}.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE {table} AS FROM read_parquet('{path}')")
        connection.sql(query).write_parquet(str(path))


MISTAKES = {
    "no interactions": (
        lambda folder: (folder / "interactions.parquet").unlink(),
        "interactions.parquet: expected a table; got no such file",
    ),
    "no items": (
        lambda folder: (folder / "items.parquet").unlink(),
        "items.parquet: expected a table; got no such file",
    ),
    "not Parquet": (
        lambda folder: (folder / "interactions.parquet").write_text("user,item\n"),
        "interactions.parquet: expected a Parquet file",
    ),
    "a missing column": (
        lambda folder: change(folder, "interactions", "SELECT user, item FROM interactions"),
        "interactions.parquet: expected the table Interactions with the columns user, item",
    ),
    "a wrong type": (
        lambda folder: change(
            folder, "interactions", "SELECT * REPLACE ('noon' AS timestamp) FROM interactions"
        ),
        "interactions.parquet, column timestamp",
    ),
    "swapped tables": (
        lambda folder: (folder / "items.parquet").replace(folder / "interactions.parquet"),
        "interactions.parquet: expected the table Interactions with the columns user, item",
    ),
    "an empty table": (
        lambda folder: change(folder, "interactions", "FROM interactions LIMIT 0"),
        "none: of 0 users the most active has 0 interactions",
    ),
    "an unknown item": (
        lambda folder: change(folder, "items", "FROM items WHERE item <> 'i5'"),
        "1 items without, first 'i5'",
    ),
    "a core that leaves nobody": (
        lambda folder: write_params(folder, min_user_interactions=8),
        "filter_sequences.min_user_interactions: expected users with at least 8 interactions with "
        "items that have at least 5; got none: of 61 users the most active has 7 interactions",
    ),
    "too few untouched items": (
        lambda folder: write_params(folder, test_negatives=35),
        "filter_sequences.test_negatives: expected 35 items without an interaction for each user of"
        " test; "
        "got 34 for user 'u",
    ),
    "no time to split by": (
        lambda folder: (
            change(
                folder,
                "interactions",
                "SELECT * REPLACE (NULL::BIGINT AS timestamp) FROM interactions",
            ),
            write_params(folder, split="time"),
        ),
        "filter_sequences.split: expected a timestamp for every interaction, to split by time; "
        "got 360 of 360 without",
    ),
    "contradictory settings": (
        lambda folder: write_params(folder, target="popular", history="recent"),
        "target: popular needs history: popular",
    ),
    "an unknown setting": (
        lambda folder: write_params(folder, negative=3),
        "unknown filter_sequences.negative",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_one_line_error_and_keeps_earlier_outputs(folder, mistake, call):
    (folder / "out").mkdir()
    for name in FILES:
        (folder / "out" / name).write_text("earlier")
    earlier = contents(folder)
    make, expected = MISTAKES[mistake]
    make(folder)
    result = call(folder)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    line = result.stderr
    assert line.startswith("error: ")
    assert expected in line
    assert contents(folder) == earlier


def test_a_user_who_touched_everything_is_an_error(folder, call):
    change(
        folder,
        "interactions",
        """
        FROM interactions
        UNION BY NAME
        SELECT 'glutton' AS user, item, 1 AS timestamp, 2000 AS position FROM interactions
        WHERE item <> 'rare' GROUP BY item
        """,
    )
    write_params(folder, split="leave_one_out")
    result = call(folder)
    assert result.returncode == 1
    assert "got 0 for user 'glutton', who has interactions with 40 of 40" in result.stderr


def test_a_full_disk_leaves_earlier_outputs(folder, call, run_stage_on_a_full_disk):
    call(folder)
    earlier = contents(folder)
    result = run_stage_on_a_full_disk("filter_sequences", *options(folder), limit=1000)
    assert result.returncode == 1
    assert "a full disk" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert contents(folder) == earlier


@pytest.mark.skipif(not REAL.is_dir(), reason="the MicroLens-50k release is not here")
def test_the_real_release_has_the_papers_statistics_in_little_memory(folder):
    (folder / "params.yaml").write_text(
        (PROJECT / "params.yaml")
        .read_text()
        .replace("source: pocket", "source: microlens")
        .replace("covers: required", "covers: optional")
        .replace("min_user_interactions: 5", "min_user_interactions: 6")
        .replace("min_item_interactions: 1", "min_item_interactions: 5")
    )
    preprocess = [sys.executable, "-m", "stages.preprocess", "--raw", str(REAL)]
    preprocess += ["--out", str(folder), "--params", str(folder / "params.yaml")]
    peaks = [
        measured(words)[1]
        for words in (
            preprocess,
            [sys.executable, "-m", "stages.filter_sequences", *options(folder)],
        )
    ]
    statistics = json.loads(contents(folder)["statistics.json"])
    figures = [statistics[name] for name in ("users", "items", "interactions")]
    assert figures == [25_411, 11_896, 220_472]
    assert max(peaks) < 1_500_000
