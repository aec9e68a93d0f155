"""What the answer store costs, and what it saves when a catalogue grows.

    python -m bench.store

The first line: the time of a lookup among a million answers. The second: model calls for summaries
and preferences after the pocket world got one per cent more items and, by new users, one per cent
more interactions, as a share of the calls for all of it.
"""

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import typer

from mllm_msr.engines.answers import Answer, AnswerStore, answer_key
from mllm_msr.pocket.world import make_items

ANSWERS = 1_000_000
LOOKUPS = 5_000
NEW_ITEMS, NEW_USERS, ITEMS_EACH = 6, 15, 2  # of 600 items, 1,500 users; 5 interactions per item


def main() -> None:
    """Print one JSON line for each case."""
    for case in (look_up, grow):
        with TemporaryDirectory() as folder:
            typer.echo(json.dumps(case(Path(folder))))


def look_up(folder: Path) -> dict[str, Any]:
    """Fill a store, open it again, and time lookups of as many keys as a stage has prompts."""
    path = folder / "answers.sqlite"
    keys = [answer_key(prompt=f"prompt {number}", limit=32) for number in range(ANSWERS)]
    with AnswerStore(path) as store:
        for start in range(0, ANSWERS, 10_000):
            text = "The user appears to have a preference for red, striped, beach. " * 3
            store.add({key: Answer(text, True) for key in keys[start : start + 10_000]}, "model")
    chosen = np.random.default_rng(0).choice(ANSWERS, LOOKUPS, replace=False)
    with AnswerStore(path) as store:
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


def grow(folder: Path) -> dict[str, Any]:
    """Run the stages up to the preferences, before and after the world has grown."""
    raw = folder / "raw"
    run(folder, "pocket_world", raw=raw, oracle=folder / "oracle.parquet")
    first = ask_everything(folder, raw)
    add_items_and_users(raw)
    second = ask_everything(folder, raw)
    return {
        "case": "1 % more items, 1 % more interactions by new users",
        "calls_before": first,
        "calls_after": second,
        "share": round(second / first, 4),
    }


def ask_everything(folder: Path, raw: Path) -> int:
    """Run preprocess to infer_preferences; gives how many prompts reached the model."""
    read, kept, images = folder / "preprocess", folder / "filter_sequences", folder / "fetch_images"
    run(folder, "preprocess", raw=raw, out=read)
    tables = {name: read / f"{name}.parquet" for name in ("interactions", "items", "pictures")}
    run(folder, "filter_sequences", **tables, out=kept)
    run(folder, "fetch_images", pictures=kept / "pictures.parquet", out=images)
    items = kept / "items.parquet"
    asked = run(
        folder,
        "summarize_items",
        **{"items": items, "images": images / "images.parquet", "out": folder / "summarize_items"},
    )
    summaries = folder / "summarize_items/summaries.parquet"
    histories = kept / "histories.parquet"
    return asked + run(
        folder,
        "infer_preferences",
        **{"histories": histories, "summaries": summaries, "items": items},
        out=folder / "infer_preferences",
    )


def add_items_and_users(raw: Path) -> None:
    """Add items that only new users take; the new users are otherwise like earlier ones."""
    generator = np.random.default_rng(7)
    new = make_items(generator, NEW_ITEMS)
    with (raw / "items.csv").open("a", newline="", encoding="utf-8") as file:
        for number, item in enumerate(new):
            item.draw().save(raw / "images" / f"new{number}.png")
            row = [f"new{number}", item.title, item.description, f"images/new{number}.png"]
            csv.writer(file, lineterminator="\n").writerow(row)
    with (raw / "interactions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    users = list(dict.fromkeys(row["user"] for row in rows))[:NEW_USERS]
    with (raw / "interactions.csv").open("a", newline="", encoding="utf-8") as file:
        for number, user in enumerate(users):
            theirs = [row for row in rows if row["user"] == user]
            for place, row in enumerate(theirs):
                item = row["item"]
                if place in range(1, 1 + ITEMS_EACH):
                    item = f"new{(number * ITEMS_EACH + place) % NEW_ITEMS}"
                csv.writer(file, lineterminator="\n").writerow(
                    [f"new{number}", item, row["timestamp"]]
                )


def run(folder: Path, stage: str, **options: Path) -> int:
    """Run a stage with a store of its own; gives how many prompts it put to the model."""
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    finished = subprocess.run(  # noqa: S603  # our own stage
        [sys.executable, "-m", f"stages.{stage}", *words],
        env=os.environ | {"MLLM_MSR_ANSWERS": str(folder / "answers.sqlite")},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    asked = re.search(r"asked ([\d,]+)", finished.stdout)
    return int(asked[1].replace(",", "")) if asked else 0


if __name__ == "__main__":
    typer.run(main)
