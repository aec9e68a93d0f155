"""What the response store costs, and what it saves when a catalogue grows.

    python -m bench.store

The first line: the time of a lookup among a million answers. The others: model calls after the
pocket world got one per cent more items and one per cent more interactions, as a share of the calls
for all of it; once the interactions come from new users, and once from known ones, one more from
each. The adapter is unchanged: a score depends on it, so that one which was trained again has every
score asked again, by design. The adapter here is an untrained one, for calls are counted and not
what they answer.
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

from mllm_msr.engines.responses import Response, ResponseStore, response_key
from mllm_msr.pocket.world import make_items

ANSWERS = 1_000_000
LOOKUPS = 5_000
NEW_ITEMS, NEW_USERS, ITEMS_EACH = 6, 15, 2  # of 600 items, 1,500 users; 5 interactions per item
ENOUGH = 5  # interactions with an item, for it to be kept

Row = dict[str, str]


def main() -> None:
    """Print one JSON line for each case."""
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
    """Run the stages that ask a model, before and after the world has grown.

    Args:
        folder: For everything.
        by: Who brings the new interactions, in words.
        more: Gives them, from those that are there.
    """
    raw, params = folder / "raw", folder / "params.yaml"
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["sft"]["epochs"] = 0
    params.write_text(yaml.safe_dump(settings), encoding="utf-8")
    run(folder, "pocket_world", raw=raw, oracle=folder / "oracle.parquet")
    read = preprocess(folder, raw)
    before = ask_for_texts(folder, read)
    run(folder, "sft", **recommender_tables(folder), **splits(folder), out=folder / "sft")
    before |= ask_for_scores(folder)
    share = add_items_and_interactions(raw, more)
    read = preprocess(folder, raw)
    after = ask_for_texts(folder, read) | ask_for_scores(folder)
    return {
        "case": f"1 % more items, {share:.1%} more interactions: {by}",
        "calls_before": before,
        "calls_after": after,
        "share": part(after, before, "summaries", "preferences", "scores"),
        "share_of_texts": part(after, before, "summaries", "preferences"),
        "share_of_scores": part(after, before, "scores"),
    }


def part(some: dict[str, int], whole: dict[str, int], *kinds: str) -> float:
    """Give the share of some calls of all, those of some kinds counted together."""
    return round(sum(some[kind] for kind in kinds) / sum(whole[kind] for kind in kinds), 4)


def preprocess(folder: Path, raw: Path) -> Path:
    """Run the stages before the first model; gives the folder of the tables kept."""
    read, kept = folder / "preprocess", folder / "filter_sequences"
    run(folder, "preprocess", raw=raw, out=read)
    tables = {name: read / f"{name}.parquet" for name in ("interactions", "items", "image_sources")}
    run(folder, "filter_sequences", **tables, out=kept)
    sources, images = kept / "image_sources.parquet", folder / "fetch_images"
    run(folder, "fetch_images", image_sources=sources, raw=raw, out=images)
    return kept


def ask_for_texts(folder: Path, kept: Path) -> dict[str, int]:
    """Run the stages that ask for texts; gives how many prompts reached the model."""
    items, histories = kept / "items.parquet", kept / "histories.parquet"
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


def ask_for_scores(folder: Path) -> dict[str, int]:
    """Run the stage score with the adapter that is there."""
    options = {"filtered": folder / "filter_sequences", "trained": folder / "sft"}
    tables = recommender_tables(folder)
    return {"scores": run(folder, "score", **options, **tables, out=folder / "score")}


def recommender_tables(folder: Path) -> dict[str, Path]:
    """Give the tables that fine-tuning and scoring share."""
    return {
        "preferences": folder / "infer_preferences/preferences.parquet",
        "items": folder / "filter_sequences/items.parquet",
        "images": folder / "fetch_images/images.parquet",
    }


def splits(folder: Path) -> dict[str, Path]:
    """Give the candidates that fine-tuning reads."""
    return {
        split: folder / f"filter_sequences/{split}_candidates.parquet"
        for split in ("train", "selection")
    }


def add_items_and_interactions(raw: Path, more: Callable[[list[Row]], Iterator[Row]]) -> float:
    """Add new items and interactions to the raw files; gives the share of the latter."""
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
    """Give interactions of new users, like those of earlier ones but for a new item or two."""
    users = list(dict.fromkeys(row["user"] for row in rows))[:NEW_USERS]
    for number, user in enumerate(users):
        theirs = [row for row in rows if row["user"] == user]
        for place, row in enumerate(theirs):
            new = f"new{(number * ITEMS_EACH + place) % NEW_ITEMS}"
            item = new if place in range(1, 1 + ITEMS_EACH) else row["item"]
            yield {"user": f"new{number}", "item": item, "timestamp": row["timestamp"]}


def list_known_users(rows: list[Row]) -> Iterator[Row]:
    """Give one more interaction, the latest, of one user for every hundred interactions.

    The first take the new items, each as often as it must be taken to be kept; the others take
    what the user before took last.
    """
    last = {row["user"]: row for row in rows}  # they are in order of time
    had = {(row["user"], row["item"]) for row in rows}
    end = int(rows[-1]["timestamp"])
    users = list(last)[: len(rows) // 100]
    for number, user in enumerate(users):
        item = last[users[number - 1]]["item"]
        if number < NEW_ITEMS * ENOUGH:
            item = f"new{number % NEW_ITEMS}"
        if (user, item) not in had:
            yield {"user": user, "item": item, "timestamp": str(end + 1 + number)}


def run(folder: Path, stage: str, **options: Path) -> int:
    """Run a stage with a store of its own; gives how many prompts it put to the model."""
    options |= {"params": folder / "params.yaml"} if stage == "sft" else {}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
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
    typer.run(main)
