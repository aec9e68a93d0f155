"""Inputs of the stage report: a finished run over the items of the small world, and its settings.

Of the test sequences, 2 has its target ranked first, 3 last and 4 tied with a negative. Their
histories have items without a title or an image, and one with a hostile title. There are two
samplings of negatives; the second skips sequence 4.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_world import CATALOGUE, HISTORIES, NEGATIVES, SPLITS, TARGETS, write_small_world

from mllm_msr.core import schemas
from mllm_msr.core.params import SECTIONS, load_all_params
from mllm_msr.core.tables import write_rows
from mllm_msr.evaluation.evaluation import evaluate
from mllm_msr.evaluation.results import write_evaluation
from mllm_msr.evaluation.retrieved_lists import read_lists
from mllm_msr.report.inputs import Inputs
from mllm_msr.report.settings import Settings

ASKED = {s: [*NEGATIVES[s], TARGETS[s]] for s in SPLITS} | {3: ["g", "e", "b"], 4: ["d", "f", "t"]}
SECOND = {1: ["d", "t"], 2: ["c", "f"], 3: ["b", "g"]}  # of sampling targets
TAKEN = TARGETS | {3: "b", 4: "t"}
SPLIT = SPLITS | {3: "test", 4: "test"}
READ = HISTORIES | {3: ["a", "f", "e", "d"], 4: ["g", "c"]}
LOG_ODDS = {
    1: {"b": 0.0, "d": -1.0, "t": 1.0},
    2: {"e": -2.0, "f": -3.0, "c": 2.0},
    3: {"g": 3.0, "e": 1.0, "b": -1.0},
    4: {"d": 0.0, "f": -4.0, "t": 0.0},
}
PREFERENCES = {2: ["Likes jugs.", "Likes red jugs, not cups."], 3: ["Likes tea."], 4: ["Likes me."]}
EVALUATE: dict[str, Any] = {
    "ks": [1, 2, 5],
    "bootstrap_samples": 20,
    "confidence": 0.9,
    "seed": 0,
    "calibration": "platt",
}
HOSTILE = "<script>document.documentElement.dataset.owned = 1</script>"


def write_report_world(
    folder: Path,
    titles: dict[str, str] | None = None,
    baselines: Mapping[str, int] | None = None,
    scored: bool = True,
) -> Inputs:
    """Write every file that the report reads.

    Args:
        folder: Folder of the stages' output folders.
        titles: Titles of items that replace those of the small world.
        baselines: The factor by which a baseline multiplies the model's log-odds, by name.
        scored: Whether the model was run; if not, its tables have no rows.
    """
    world = write_small_world(folder)
    inputs = Inputs(
        dropped=folder / "preprocess" / "dropped.json",
        filtered=world.filtered,
        images=world.images,
        summaries=world.summaries,
        preferences=world.preferences,
        trained=folder / "sft",
        scores=folder / "score" / "scores.parquet",
        evaluated=folder / "evaluate",
        studies=folder / "studies",
    )
    items = [
        {"item": item, "title": (titles or {}).get(item, title), "description": text}
        for item, title, text, _ in CATALOGUE
    ]
    write_rows(schemas.Items, items, world.items)
    _write_sequences(inputs)
    inputs.dropped.parent.mkdir()
    reasons = {"interactions_with_low_rating": 9, "repeated_interactions": 0}
    inputs.dropped.write_text(json.dumps(reasons))
    if scored:
        _write_training(inputs.trained)
    else:
        for model, path in (
            (schemas.Scores, inputs.scores),
            (schemas.Summaries, inputs.summaries),
            (schemas.Preferences, inputs.preferences),
            (schemas.Images, inputs.images),
        ):
            write_rows(model, [], path)
    paths = {name: folder / "baselines" / f"{name}.parquet" for name in baselines or {}}
    for name, times in (baselines or {}).items():
        write_rows(schemas.Scores, _score_rows(times), paths[name])
    measured = evaluate(inputs.scores, inputs.filtered, None, paths, **EVALUATE)
    write_evaluation(measured, inputs.evaluated)
    return inputs


def add_whole_catalogue(inputs: Inputs, scored: bool = True) -> None:
    """Evaluate the run again with lists of the whole catalogue: five items by each of three rows.

    Args:
        inputs: Of a finished run, whose evaluation is replaced.
        scored: Whether the model reranked the lists.
    """
    folder = inputs.evaluated.parent
    items = [item for item, *_ in CATALOGUE]
    lists = {s: [item for item in items if item not in READ[s]][:5] for s in (1, 2, 3, 4)}
    rows = [
        {"sequence": s, "split": SPLIT[s], "item": item, "rank": rank, "score": -float(rank)}
        for s, listed in lists.items()
        for rank, item in enumerate(listed, start=1)
    ]
    write_rows(schemas.Retrieved, rows, folder / "retrieve/candidates.parquet")
    firsts = [
        {"scorer": scorer, **row}
        for scorer in ("sasrec_f", "popularity")
        for row in rows
        if row["split"] == "test"
    ]
    write_rows(schemas.FirstItems, firsts, folder / "retrieve/baselines.parquet")
    scores = [
        {"sequence": row["sequence"], "item": row["item"], "split": row["split"]}
        | {"log_odds": float(ord(row["item"][0]) % 5)}
        for row in rows
    ]
    write_rows(schemas.Scores, scores if scored else [], folder / "rerank/scores.parquet")
    lists_read = read_lists(folder / "retrieve", folder / "rerank/scores.parquet", inputs.filtered)
    paths = {path.stem: path for path in (folder / "baselines").glob("*.parquet")}
    more = {"retriever": "item_knn", "lists": lists_read}
    measured = evaluate(inputs.scores, inputs.filtered, None, paths, **EVALUATE, **more)
    write_evaluation(measured, inputs.evaluated)


def make_settings(**changes: dict[str, Any]) -> Settings:
    """Return the shipped settings with changed keys, by section."""
    shipped = load_all_params(Path("params.yaml"))
    changes = {"evaluate": {"bootstrap_samples": 20}} | changes
    changed = {
        name: SECTIONS[name].model_validate(section.model_dump() | changes.get(name, {}))
        for name, section in shipped
    }
    return Settings(**changed)


def _write_sequences(inputs: Inputs) -> None:
    filtered = inputs.filtered
    sequences = [
        {"sequence": s, "user": f"u{s}", "split": SPLIT[s], "target": TAKEN[s]}
        | {"history_length": len(READ[s]), "used": True, "stratum": "warm"}
        for s in SPLIT
    ]
    write_rows(schemas.Sequences, sequences, filtered / "sequences.parquet")
    histories = [
        {"sequence": s, "position": position, "item": item}
        for s, history in READ.items()
        for position, item in enumerate(history, start=1)
    ]
    write_rows(schemas.Histories, histories, filtered / "histories.parquet")
    for split in ("valid", "test"):
        candidates = [
            {"sampling": sampling, "sequence": s, "position": position}
            | {"item": item, "label": item == TAKEN[s]}
            for sampling, asked in (("uniform", ASKED), ("targets", SECOND))
            for s, items in asked.items()
            if SPLIT[s] == split
            for position, item in enumerate(items)
        ]
        write_rows(schemas.Candidates, candidates, filtered / f"{split}_candidates.parquet")
    taken = [
        {"item": item, "interactions": number, "withheld": False}
        for number, (item, *_) in enumerate(CATALOGUE, 1)
    ]
    write_rows(schemas.Popularity, taken, filtered / "popularity.parquet")
    write_rows(schemas.Scores, _score_rows(), inputs.scores)
    preferences = [
        {"sequence": s, "block": block, "items": min(3 * block, len(READ[s])), "preference": text}
        for s, texts in PREFERENCES.items()
        for block, text in enumerate(texts, start=1)
    ]
    preferences[0]["items"], preferences[1]["items"] = 2, 3
    preferences[2]["items"] = 4
    write_rows(schemas.Preferences, preferences, inputs.preferences)
    statistics = {"users": 5, "items": 8, "interactions": 24, "average_length": 4.8}
    statistics |= {"sparsity": 0.4, "sequences": {"train": 1, "valid": 1, "test": 3}}
    statistics |= {"used_sequences": statistics["sequences"]}
    statistics |= {"test_strata": {"cold": 0, "rare": 0, "warm": 3}, "withheld_items": 0}
    statistics |= {"targets_tied_in_time": 2}
    statistics |= {"dropped": {"interactions_of_rare_users": 2, "sequences_with_short_history": 0}}
    (filtered / "statistics.json").write_text(json.dumps(statistics))


def _score_rows(times: int = 1) -> list[dict[str, Any]]:
    """Return the rows of a table Scores: the model's log-odds times a number."""
    return [
        {"sequence": s, "item": item, "split": SPLIT[s], "log_odds": times * log_odds}
        for s, scored in LOG_ODDS.items()
        for item, log_odds in scored.items()
    ]


def _write_training(folder: Path) -> None:
    """Write a training report and its curves."""
    curves = {
        "train/loss": [(1, 2.0), (2, 1.0)],
        "valid/loss": [(0, 3.0), (2, 1.5)],
        "valid/auc": [(0, 0.5), (2, 0.75)],
    }
    for name, points in curves.items():
        file = folder / "curves" / "plots" / "metrics" / f"{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"step\t{file.stem}", *(f"{step}\t{value}" for step, value in points)]
        file.write_text("\n".join(lines) + "\n")
    report = {"steps": 2, "epoch": 1, "valid_auc": 0.75, "valid_loss": 1.5, "model": "x"}
    (folder / "training.json").write_text(json.dumps(report))
