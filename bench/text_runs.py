"""Runs of a text-only language model on MicroLens-50k, in several variants and protocols.

    python -m bench.text_runs run --work runs --model models/smollm2-135m-instruct --minutes 170
    python -m bench.text_runs table --work runs --against titles

``run`` executes the pipeline's stages, each with its own folder of outputs, as ``--dry-run`` prints
them. Finished steps are skipped, and the response store and checkpoints are kept, so a run that was
stopped resumes. ``table`` prints every finished job and simple scorers, on the same test sequences.
The files of the release are read from data/raw/microlens.
"""

import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
import yaml

from mllm_msr.core.arrays import Floats
from mllm_msr.core.errors import DataError, ParamsError, report_errors_on_one_line
from mllm_msr.core.files import atomic_write
from mllm_msr.core.params import check_params, read_yaml
from mllm_msr.core.schemas import STRATA, Sequences
from mllm_msr.core.tables import read_rows
from mllm_msr.evaluation.comparisons import compare_pairs
from mllm_msr.evaluation.metrics import bootstrap_interval, measure
from mllm_msr.evaluation.scored_candidates import score_candidates
from mllm_msr.evaluation.scorers import MODEL, label_of
from mllm_msr.evaluation.strata import ENOUGH
from mllm_msr.evaluation.table import format_difference, format_markdown
from mllm_msr.presets import SETTINGS, default_folder, find_presets, plan
from mllm_msr.ranking import TargetRanks, auc, rank_targets

CONFIDENCE, SAMPLES, SEED = 0.95, 10_000, 2026  # of the intervals
METRICS = ("hr@5", "ndcg@5", "mrr@5")
VALID, TEST = 200, 800  # sequences that are used
EPOCHS = {8192: 1, 1024: 2, 256: 4, 1: 8}  # by the least number of training sequences
RAW = Path("data/raw/microlens")
PROTOCOLS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {  # preset and further settings
    "ours": ("microlens", {}),
    "paper": ("microlens_paper", {}),
    "cold": (
        "microlens",
        {
            "filter_sequences": {
                "split": "cold_items",
                "evaluation_sampling": ["stratum", "targets"],
            }
        },
    ),
}
BASELINES = ("item_knn", "content_knn", "markov", "fpmc", "gru4rec", "sasrec", "bert4rec")
FEATURE_BASELINES = ("gru4rec_f",)  # on vectors of the titles
SHOWN = ("target_popularity", "popularity", "chance")


class Command(NamedTuple):
    """One command and the file or folder that it writes."""

    words: tuple[str, ...]
    writes: Path


@dataclass(frozen=True)
class Job:
    """One row of a protocol's table.

    Attributes:
        protocol: Key of :data:`PROTOCOLS`.
        mode: ``infer_preferences.mode``.
        train: Training sequences; 0: zero-shot.
        seed: Of the fine-tuning.
        baseline: A baseline in place of the model; it learns from all users, or with ``few`` from
            those of the training sequences.
        few: See above.
    """

    protocol: str
    mode: str = "none"
    train: int = 0
    seed: int = 2026
    baseline: str = ""
    few: bool = False


JOBS: dict[str, Job] = {
    "zero-shot": Job("ours"),
    "titles": Job("ours", train=2048),
    "direct": Job("ours", "direct", 2048),
    "recurrent": Job("ours", "recurrent", 2048),
    "recurrent-seed-2027": Job("ours", "recurrent", 2048, seed=2027),
    "recurrent-zero-shot": Job("ours", "recurrent"),
    "titles-64": Job("ours", train=64),
    "titles-256": Job("ours", train=256),
    "titles-1024": Job("ours", train=1024),
    "titles-8192": Job("ours", train=8192),
    "cold-zero-shot": Job("cold"),
    "cold-titles": Job("cold", train=2048),
    "cold-titles-1024": Job("cold", train=1024),
    "cold-recurrent": Job("cold", "recurrent", 2048),
    "paper-zero-shot": Job("paper"),
    "paper-recurrent": Job("paper", "recurrent", 2048),
    **{
        f"{protocol}-{name}": Job(protocol, baseline=name)
        for protocol in PROTOCOLS
        for name in (*BASELINES, *FEATURE_BASELINES)
    },
    **{
        f"sasrec-{train}": Job("ours", train=train, baseline="sasrec", few=True)
        for train in (64, 256, 1024, 2048)
    },
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="Folder of all outputs.")]


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Jobs.", show_default="all")] = None,
    work: Work = Path("runs"),
    model: Annotated[str, typer.Option(help="The language model.")] = (
        "models/smollm2-135m-instruct"
    ),
    minutes: Annotated[float, typer.Option(help="After which nothing runs any more.")] = 170,
    workers: Annotated[int, typer.Option(min=1, help="Jobs at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands.")] = False,
) -> None:
    """Run the steps of jobs that are not finished.

    Example: python -m bench.text_runs run titles recurrent --minutes 60
    """
    chosen = _choose(names)
    write_settings(work, model, chosen)
    if dry_run:
        commands = dict.fromkeys(each for name in chosen for each in steps(name, work))
        root = f"DVC_ROOT={shlex.quote(str(work.absolute()))}"
        typer.echo("\n".join(f"{root} {shlex.join(each.words)}" for each in commands))
        return
    end = time.monotonic() + 60 * minutes
    for protocol in dict.fromkeys(JOBS[name].protocol for name in chosen):
        _execute(prepare(protocol, work), work, end)  # shared, so before anything at once
    with ThreadPoolExecutor(workers) as pool:
        for name, done in zip(
            chosen,
            pool.map(lambda name: _execute(steps(name, work), work, end), chosen),
            strict=True,
        ):
            typer.echo(f"{name}: {'finished' if done else 'not finished'}")


@app.command()
def table(
    work: Work = Path("runs"),
    against: Annotated[str, typer.Option(help="The job that others are compared with.")] = "titles",
) -> None:
    """Print a table for each protocol and sampling: finished jobs with intervals and tests.

    Each row is compared with one job (where a protocol lacks it: with its first); p is
    Holm-corrected within a table. The last columns are the AUC of rare, cold and warm targets.
    """
    _choose([against])
    finished = [name for name in JOBS if scores_of(name, work).is_file()]
    if not finished:
        fix = "run a job, or name the folder of its outputs"
        raise DataError(expected="a finished job", got="none", where=str(work), fix=fix)
    for protocol in PROTOCOLS:
        names = [name for name in finished if JOBS[name].protocol == protocol]
        if names:
            names.sort(key=lambda name: name != against)
            for sampling, shown in tabulate(names, work):
                typer.echo(f"\nProtocol {protocol}, negatives: {sampling}\n\n{shown}")


def steps(name: str, work: Path) -> list[Command]:
    """Return the commands of a job, in order, those that it shares with others included."""
    job, out = JOBS[name], scores_of(name, work).parent
    commands = prepare(job.protocol, work)
    filtered, own = _filtered(job, work), ("--params", str(_params(name, work)))
    if filtered != _shared(job.protocol, work):
        commands.append(_filter(job.protocol, filtered, _params(name, work), work))
    interactions = work / job.protocol / "preprocess/interactions.parquet"
    if job.baseline:
        stage = "feature_baselines" if job.baseline in FEATURE_BASELINES else "baselines"
        words = ["--interactions", str(interactions), "--filtered", str(filtered)]
        if stage == "feature_baselines":
            features = work / job.protocol / "encode_items/features.parquet"
            words += ["--features", str(features)]
            commands.append(_encode(job.protocol, work))
        words += ["--out", str(out), *own]
        commands.append(_stage(stage, scores_of(name, work), job.baseline, *words))
        return commands
    items, images = filtered / "items.parquet", work / job.protocol / "fetch_images/images.parquet"
    summaries = work / job.protocol / "summarize_items/summaries.parquet"
    folder = work / job.protocol / f"preferences_{job.mode}_{filtered.name}"
    preferences = folder / "preferences.parquet"
    tables = ("--items", str(items), "--images", str(images), "--preferences", str(preferences))
    commands += [
        _stage(
            "infer_preferences",
            preferences,
            *("--histories", str(filtered / "histories.parquet"), "--items", str(items)),
            *("--summaries", str(summaries), "--out", str(folder), *own),
        ),
        _stage(
            "sft",
            out / "sft/training.json",
            *("--train", str(filtered / "train_candidates.parquet")),
            *("--selection", str(filtered / "selection_candidates.parquet")),
            *(*tables, "--out", str(out / "sft"), *own),
        ),
        _stage(
            "score",
            scores_of(name, work),
            *("--filtered", str(filtered), *tables),
            *("--trained", str(out / "sft"), "--out", str(out), *own),
        ),
    ]
    return commands


def prepare(protocol: str, work: Path) -> list[Command]:
    """Return the commands that all jobs of a protocol share."""
    folder, params = work / protocol, _params(protocol, work)
    filtered = _shared(protocol, work)
    items, images = filtered / "items.parquet", folder / "fetch_images/images.parquet"
    own = ("--params", str(params))
    return [
        _stage(
            "preprocess",
            folder / "preprocess/interactions.parquet",
            *("--raw", str(RAW), "--out", str(folder / "preprocess"), *own),
        ),
        _filter(protocol, filtered, params, work),
        _stage(
            "fetch_images",
            images,
            *("--image-sources", str(filtered / "image_sources.parquet"), "--raw", str(RAW)),
            *("--out", str(images.parent), *own),
        ),
        _stage(
            "summarize_items",
            folder / "summarize_items/summaries.parquet",
            *("--items", str(items), "--images", str(images)),
            *("--out", str(folder / "summarize_items"), *own),
        ),
    ]


def scores_of(name: str, work: Path) -> Path:
    """Return the file of a job's scores."""
    file = f"{JOBS[name].baseline}.parquet" if JOBS[name].baseline else "scores.parquet"
    return work / "jobs" / name / file


def write_settings(work: Path, model: str, names: Sequence[str]) -> None:
    """Write the settings of jobs and of their protocols.

    Raises:
        ParamsError: There are other settings in the folder already.
    """
    for protocol in dict.fromkeys(JOBS[name].protocol for name in names):
        _write(_params(protocol, work), _settings(protocol, model, work, {}))
    for name in names:
        job = JOBS[name]
        changes: dict[str, dict[str, Any]] = {
            "infer_preferences": {"mode": job.mode},
            "sft": {"seed": job.seed} | _recipe(job.train),
            "filter_sequences": {"budget": _budget(job)},
        }
        if job.baseline in FEATURE_BASELINES:
            changes["feature_baselines"] = {"models": [job.baseline]}
        _write(_params(name, work), _settings(job.protocol, model, work, changes))


def tabulate(names: Sequence[str], work: Path) -> Iterator[tuple[str, str]]:
    """Yield each sampling and its table: jobs and simple scorers, compared with the first job."""
    ranks = {name: _ranks(name, work) for name in names}
    simple = _simple_ranks(JOBS[names[0]], work)
    strata = _read_strata(_shared(JOBS[names[0]].protocol, work))
    for sampling in ranks[names[0]]:
        rows = {_label(name): found[sampling] for name, found in ranks.items()}
        rows |= {label_of(name): found[sampling] for name, found in simple.items()}
        first, *others = rows
        pairs = [(auc(rows[name]), auc(rows[first])) for name in others]
        compared = dict(zip(others, compare_pairs(pairs, confidence=CONFIDENCE), strict=True))
        head = ["", "AUC", *METRICS, f"AUC above {first}", "p"]
        shown = _count_shown([strata[sequence] for sequence in rows[first].sequences.tolist()])
        head += [f"{stratum} ({count})" for stratum, count in shown.items()]
        lines = [head]
        for name, found in rows.items():
            figures = measure(found, [5])
            line = [name, _interval(auc(found))]
            line += [f"{figures[key].mean():.3f}" for key in METRICS]
            line += format_difference(compared[name]) if name in compared else ["", ""]
            of_target = np.array([strata[sequence] for sequence in found.sequences.tolist()])
            for stratum in shown:
                line.append(_interval(auc(found)[of_target == stratum]))
            lines.append(line)
        yield sampling, format_markdown(lines)


def _choose(names: Sequence[str] | None) -> list[str]:
    unknown = [name for name in names or () if name not in JOBS]
    if unknown:
        raise ParamsError(
            expected=f"jobs among {', '.join(JOBS)}",
            got=", ".join(unknown),
            where="bench.text_runs",
            fix="correct the name",
        )
    return list(names or JOBS)


def _budget(job: Job) -> dict[str, Any]:
    used = "used" if job.few else "all"
    return {"train": job.train or 1, "valid": VALID, "test": TEST, "interactions": used}


def _recipe(train: int) -> dict[str, int]:
    """Return epochs and batch size: more epochs of few sequences, larger batches of many.

    From 1,024 sequences on, a training has 256 steps.
    """
    if not train:
        return {"epochs": 0}
    epochs = next(epochs for least, epochs in EPOCHS.items() if train >= least)
    return {"epochs": epochs, "batch_size": 32 * min(4, max(1, train // 1024))}


def _settings(
    protocol: str, model: str, work: Path, changes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the shipped settings with the presets of a protocol and further changes."""
    preset, own = PROTOCOLS[protocol]
    with atomic_write(work / "presets.yaml") as temporary:
        presets = find_presets(default_folder(SETTINGS))
        _, text = plan([presets[preset], presets["smollm2_text"]], SETTINGS)
        temporary.write_text(text, encoding="utf-8")
    settings = read_yaml(work / "presets.yaml")
    budget = {"budget": {"train": 1, "valid": VALID, "test": TEST, "interactions": "all"}}
    roles = ("summarize_items", "encode_items", "infer_preferences", "recommender")
    models = {role: {"model": model} for role in roles}
    no_times = [name for name in settings["baselines"]["models"] if name != "recent_popularity"]
    baselines = {"baselines": {"models": no_times}}
    for part in (models, baselines, {"filter_sequences": budget}, own, changes):
        for section, keys in part.items():
            settings[section] |= keys
    check_params(settings, work / "params.yaml")
    return settings


def _filtered(job: Job, work: Path) -> Path:
    """Return the folder of a job's sequences: shared where nothing is learned from them."""
    if not job.few and (job.baseline or not job.train):
        return _shared(job.protocol, work)
    return work / job.protocol / f"filtered_{job.train}{'_few' if job.few else ''}"


def _shared(protocol: str, work: Path) -> Path:
    return work / protocol / "filtered"


def _params(name: str, work: Path) -> Path:
    return work / "settings" / f"{name}.yaml"


def _filter(protocol: str, filtered: Path, params: Path, work: Path) -> Command:
    folder = work / protocol / "preprocess"
    return _stage(
        "filter_sequences",
        filtered / "test_candidates.parquet",
        *("--interactions", str(folder / "interactions.parquet")),
        *("--items", str(folder / "items.parquet")),
        *("--image-sources", str(folder / "image_sources.parquet")),
        *("--out", str(filtered), "--params", str(params)),
    )


def _encode(protocol: str, work: Path) -> Command:
    folder = work / protocol
    return _stage(
        "encode_items",
        folder / "encode_items/features.parquet",
        *("--items", str(_shared(protocol, work) / "items.parquet")),
        *("--images", str(folder / "fetch_images/images.parquet")),
        *("--summaries", str(folder / "summarize_items/summaries.parquet")),
        *("--out", str(folder / "encode_items"), "--params", str(_params(protocol, work))),
    )


def _stage(stage: str, writes: Path, *words: str) -> Command:
    return Command(("python", "-m", f"stages.{stage}", *words), writes)


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings, unless finished steps may have had others: they are not repeated."""
    if not path.is_file():
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
    elif read_yaml(path) != settings:
        raise ParamsError(
            expected="the settings of the steps that are finished",
            got="others, by another --model or a changed preset",
            where=str(path),
            fix="name another --work, or delete the settings and the outputs made with them",
        )


def _execute(commands: Sequence[Command], work: Path, end: float) -> bool:
    """Run commands whose output is missing; return whether all are finished by the end.

    Raises:
        CalledProcessError: A command failed.
    """
    environment = os.environ | {"DVC_ROOT": str(work.absolute())}
    for command in commands:
        if command.writes.exists():
            continue
        left = end - time.monotonic()
        if left <= 0:
            return False
        words = [sys.executable, *command.words[1:]]
        try:
            subprocess.run(words, check=True, timeout=left, env=environment)  # noqa: S603
        except subprocess.TimeoutExpired:
            return False
    return True


def _label(name: str) -> str:
    job = JOBS[name]
    if job.baseline:
        few = f", {job.train:,} sequences" if job.few else ""
        return f"{label_of(job.baseline)}{few}"
    return name.removeprefix(f"{job.protocol}-")


def _ranks(name: str, work: Path) -> dict[str, TargetRanks]:
    """Return the ranks of the test targets by sampling."""
    job = JOBS[name]
    return _rank(job.baseline or MODEL, scores_of(name, work), job, work)


def _simple_ranks(job: Job, work: Path) -> dict[str, dict[str, TargetRanks]]:
    filtered = _shared(job.protocol, work)
    return {name: _rank(name, filtered / "popularity.parquet", job, work) for name in SHOWN}


def _rank(scorer: str, scores: Path, job: Job, work: Path) -> dict[str, TargetRanks]:
    scored = score_candidates({scorer: scores}, _shared(job.protocol, work))
    return {
        sampling: rank_targets(*rows)
        for (sampling, _, split), rows in scored.items()
        if split == "test"
    }


def _read_strata(filtered: Path) -> dict[int, str]:
    """Return the stratum of the target of each used test sequence."""
    rows = read_rows(Sequences, filtered / "sequences.parquet", order="sequence")
    return {
        row["sequence"]: row["stratum"] for row in rows if row["split"] == "test" and row["used"]
    }


def _count_shown(strata: Sequence[str]) -> dict[str, int]:
    """Count the sequences of each stratum that has enough of them."""
    counts = Counter(strata)
    return {stratum: counts[stratum] for stratum in STRATA if counts[stratum] >= ENOUGH}


def _interval(values: Floats) -> str:
    """Format a mean with its interval, such as ``0.812 [0.790, 0.834]``."""
    low, high = bootstrap_interval(values[:, None], SAMPLES, CONFIDENCE, SEED)
    return f"{np.mean(values):.3f} [{low[0]:.3f}, {high[0]:.3f}]"


if __name__ == "__main__":
    with report_errors_on_one_line():
        app()
