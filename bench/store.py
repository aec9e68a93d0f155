"""Lookup time of the response store, and the model calls that it saves when a catalogue grows.

    python -m bench.store

The first JSON line is the time of a lookup among a million responses. The others count the model
calls after the pocket world grows by 1 % of items and 1 % of interactions, as a share of all calls:
once with interactions of new users, and once with one more interaction of known users. The adapter
is unchanged, because all scores depend on it: a newly trained adapter scores everything again by
design. It is untrained here, because calls are counted and their results do not matter.
"""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import typer
import yaml

from mllm_msr.core.errors import report_errors_on_one_line
from mllm_msr.engines.response_store import Response, ResponseStore, response_key
from mllm_msr.pocket.world import make_items

ANSWERS = 1_000_000
LOOKUPS = 5_000
# The pocket world has 1,500 items and as many users; each new item gets five interactions.
NEW_ITEMS, NEW_USERS, ITEMS_EACH = 15, 15, 5
MIN_INTERACTIONS = 5  # of an item in the k-core

Row = dict[str, str]


def main() -> None:
    """Print one JSON line per case."""
    by_new_users = partial(grow, by="new users", more=list_new_users)
    by_known_users = partial(grow, by="one more of known users", more=list_known_users)
    for case in (look_up, by_new_users, by_known_users):
        with TemporaryDirectory() as folder:
            typer.echo(json.dumps(case(Path(folder))))


def look_up(folder: Path) -> dict[str, Any]:
    """Fill a store, open it again, and time lookups of as many keys as a stage has prompts."""
    path = folder / "responses.sqlite"
    keys = [response_key(prompt=f"prompt {number}", limit=32) for number in range(ANSWERS)]
    with ResponseStore(path) as store:
        for start in range(0, ANSWERS, 10_000):
            text = "The user appears to have a preference for red, striped, beach. " * 3
            store.add({key: Response(text, True) for key in keys[start : start + 10_000]}, "model")
    chosen = np.random.default_rng(0).choice(ANSWERS, LOOKUPS, replace=False)
    with ResponseStore(path) as store:
        start_time = time.perf_counter()
        found = store.find([keys[number] for number in chosen])
        seconds = time.perf_counter() - start_time
    assert len(found) == LOOKUPS
    return {
        "case": "lookup",
        "answers": ANSWERS,
        "file_mb": round(path.stat().st_size / 1e6),
        "microseconds_per_lookup": round(seconds / LOOKUPS * 1e6, 1),
    }


def grow(folder: Path, by: str, more: Callable[[list[Row]], Iterator[Row]]) -> dict[str, Any]:
    """Run the stages that call a model, before and after the pocket world grows.

    Args:
        folder: Working folder.
        by: Description of the new interactions.
        more: Yields the new interactions, given the existing ones.
    """
    raw, params = folder / "raw", folder / "params.yaml"
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["sft"]["epochs"] = 0
    params.write_text(yaml.safe_dump(settings), encoding="utf-8")
    run(folder, "pocket_world", raw=raw, oracle=folder / "oracle.parquet")
    read = preprocess(folder, raw)
    before = generate_texts(folder, read)
    run(folder, "sft", **recommender_tables(folder), **splits(folder), out=folder / "sft")
    before |= score_candidates(folder)
    share = add_items_and_interactions(raw, more)
    read = preprocess(folder, raw)
    after = generate_texts(folder, read) | score_candidates(folder)
    return {
        "case": f"1 % more items, {share:.1%} more interactions: {by}",
        "calls_before": before,
        "calls_after": after,
        "share": share_of(after, before, "summaries", "preferences", "scores"),
        "share_of_texts": share_of(after, before, "summaries", "preferences"),
        "share_of_scores": share_of(after, before, "scores"),
    }


def share_of(some: dict[str, int], total: dict[str, int], *kinds: str) -> float:
    """Return the calls of some kinds as a share of the same kinds in another count."""
    return round(sum(some[kind] for kind in kinds) / sum(total[kind] for kind in kinds), 4)


def preprocess(folder: Path, raw: Path) -> Path:
    """Run the stages before the first model; return the folder of the filtered tables."""
    read, filtered = folder / "preprocess", folder / "filter_sequences"
    run(folder, "preprocess", raw=raw, out=read)
    tables = {name: read / f"{name}.parquet" for name in ("interactions", "items", "image_sources")}
    run(folder, "filter_sequences", **tables, out=filtered)
    sources, images = filtered / "image_sources.parquet", folder / "fetch_images"
    run(folder, "fetch_images", image_sources=sources, raw=raw, out=images)
    return filtered


def generate_texts(folder: Path, filtered: Path) -> dict[str, int]:
    """Run the stages that generate text; return the number of model calls of each."""
    items, histories = filtered / "items.parquet", filtered / "histories.parquet"
    summaries = folder / "summarize_items"
    images = folder / "fetch_images/images.parquet"
    return {
        "summaries": run(folder, "summarize_items", items=items, images=images, out=summaries),
        "preferences": run(
            folder,
            "infer_preferences",
            histories=histories,
            summaries=summaries / "summaries.parquet",
            items=items,
            out=folder / "infer_preferences",
        ),
    }


def score_candidates(folder: Path) -> dict[str, int]:
    """Run the stage score; return its number of model calls."""
    options = {"filtered": folder / "filter_sequences", "trained": folder / "sft"}
    tables = recommender_tables(folder)
    return {"scores": run(folder, "score", **options, **tables, out=folder / "score")}


def recommender_tables(folder: Path) -> dict[str, Path]:
    """Return the tables that both fine-tuning and scoring read."""
    return {
        "preferences": folder / "infer_preferences/preferences.parquet",
        "items": folder / "filter_sequences/items.parquet",
        "images": folder / "fetch_images/images.parquet",
    }


def splits(folder: Path) -> dict[str, Path]:
    """Return the candidates that fine-tuning reads."""
    return {
        split: folder / f"filter_sequences/{split}_candidates.parquet"
        for split in ("train", "selection")
    }


def add_items_and_interactions(raw: Path, more: Callable[[list[Row]], Iterator[Row]]) -> float:
    """Add new items and interactions to the raw files; return the share of new interactions."""
    with (raw / "items.csv").open("a", newline="", encoding="utf-8") as file:
        for number, item in enumerate(make_items(np.random.default_rng(7), NEW_ITEMS)):
            item.draw().save(raw / "images" / f"new{number}.png")
            row = [f"new{number}", item.title, item.description, f"images/new{number}.png"]
            csv.writer(file, lineterminator="\n").writerow(row)
    with (raw / "interactions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    added = list(more(rows))
    with (raw / "interactions.csv").open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, ["user", "item", "timestamp"], lineterminator="\n").writerows(added)
    return len(added) / len(rows)


def list_new_users(rows: list[Row]) -> Iterator[Row]:
    """Yield interactions of new users: copies of existing users' with two new items each."""
    users = list(dict.fromkeys(row["user"] for row in rows))[:NEW_USERS]
    for number, user in enumerate(users):
        theirs = [row for row in rows if row["user"] == user]
        for index, row in enumerate(theirs):
            new = f"new{(number * ITEMS_EACH + index) % NEW_ITEMS}"
            item = new if index in range(1, 1 + ITEMS_EACH) else row["item"]
            yield {"user": f"new{number}", "item": item, "timestamp": row["timestamp"]}


def list_known_users(rows: list[Row]) -> Iterator[Row]:
    """Yield one later interaction of a known user for every hundred interactions.

    The first users get the new items, each often enough for the k-core; the others get the last
    item of the user before.
    """
    last = {row["user"]: row for row in rows}  # rows are ordered by time
    had = {(row["user"], row["item"]) for row in rows}
    end = int(rows[-1]["timestamp"])
    users = list(last)[: len(rows) // 100]
    for number, user in enumerate(users):
        item = last[users[number - 1]]["item"]
        if number < NEW_ITEMS * MIN_INTERACTIONS:
            item = f"new{number % NEW_ITEMS}"
        if (user, item) not in had:
            yield {"user": user, "item": item, "timestamp": str(end + 1 + number)}


def run(folder: Path, stage: str, **options: Path) -> int:
    """Run a stage with its own response store; return its number of model calls."""
    options |= {"params": folder / "params.yaml"} if stage == "sft" else {}
    names = {key: f"--{key.replace('_', '-')}" for key in options}
    words = [word for key, value in options.items() for word in (names[key], str(value))]
    finished = subprocess.run(  # noqa: S603  # our own stage
        [sys.executable, "-m", f"stages.{stage}", *words],
        env=os.environ | {"MLLM_MSR_RESPONSES": str(folder / "responses.sqlite")},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    asked = re.search(r"asked ([\d,]+)", finished.stdout)
    return int(asked[1].replace(",", "")) if asked else 0


if __name__ == "__main__":
    with report_errors_on_one_line():
        typer.run(main)
