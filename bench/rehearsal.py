"""Rehearsal of the preset microlens_paper on a GPU: every model stage on models of full size.

    python -m bench.rehearsal --out rehearsal.jsonl
    python -m bench.rehearsal --small          # the same code with tiny models, on a CPU

The models have the shapes of the paper's, and random weights, which are drawn on the device. Texts,
images and pairs are generated from a seed. Prints one JSON line for each part as soon as it is
finished, and the extrapolated hours of the whole preset at the end; ``docs/benchmarks.md`` explains
the fields. Nothing is read from a network.
"""

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer
import yaml
from transformers import AutoTokenizer

from bench import memory, shapes
from bench.generated_data import TITLE_TOKENS, Sizes, write_tables
from bench.items import (
    STEPS,
    encode_item_images,
    encode_item_summaries,
    summarize,
    summarize_by_reference,
)
from bench.preferences import infer, infer_by_reference
from bench.scoring import score, score_by_reference
from bench.timing import (
    Measured,
    Options,
    describe,
    describe_machine,
    matrix_rate,
    measure,
    release_memory,
)
from bench.training import train_packed, tune_by_reference
from mllm_msr.core.devices import DTYPES, find_device
from mllm_msr.core.errors import report_errors_on_one_line
from mllm_msr.presets import find_shipped, plan
from mllm_msr.training.schedule import count_validations

PRESET = "microlens_paper"
LLAVA, LLAMA = "llava-1.6-mistral-7b", "llama-3-8b"
# After filter_sequences with the preset, on MicroLens-50k (docs/datasets.md).
SEQUENCES, ITEMS = 25_411, 11_896
EPOCHS = 1  # of the rehearsal; all epochs cost about the same
TRACED_SECONDS = 5.0  # a trace of more is too large to look at
SCORING, TRAINING, PREFERENCES = "scoring", "fine-tuning", "preferences"
IMAGES, TEXTS = "image features", "summary features"
SUMMARIES = "summaries"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Side = Callable[[Options], Measured | dict[str, Measured]]


class Part(NamedTuple):
    """A part of the rehearsal.

    Attributes:
        name: Of its lines.
        model: Name of its model.
        side: What is measured.
        seconds: After which its timed work is cut off.
        work: What ``bench/memory.py`` calls it.
        targets: By field of its line.
        against: Lines of the same work by us; the part is then the reference's.
    """

    name: str
    model: str
    side: Side
    seconds: float
    work: str = "answers"
    targets: Mapping[str, float] = {}
    against: Sequence[str] = ()


class Scale(NamedTuple):
    """The size of a rehearsal.

    Attributes:
        sizes: Of the generated data.
        changes: Changed sizes of the models.
        new_tokens: Of each response; None: as many as the preset allows.
        reference: Items, sequences and batches of the reference.
    """

    sizes: Sizes
    changes: Mapping[str, int]
    new_tokens: int | None
    reference: int


# Pairs per image, which share its tokens, are those of the preset: 2 * 20,329 / 11,896 in an epoch
# of fine-tuning, and 41 * 5,082 / 11,896 in scoring.
FULL = Scale(
    Sizes(
        items=96,
        histories=256,
        train=60,
        test=26,
        candidates=24,
        train_items=35,
        test_items=36,
        text_tokens=200,
    ),
    changes={},
    new_tokens=None,
    reference=6,
)
SMALL = Scale(
    Sizes(
        items=6,
        histories=6,
        train=4,
        test=4,
        candidates=5,
        train_items=3,
        test_items=5,
        text_tokens=8,
    ),
    changes=shapes.TINY,
    new_tokens=8,
    reference=1,
)

PARTS = (
    Part(SCORING, LLAVA, score, 60, targets={"share_of_matrix_rate": 0.5}),
    Part(
        "scoring by the reference",
        LLAVA,
        partial(score_by_reference, every_token=True),
        20,
        targets={"ratio": 15},
        against=(SCORING,),
    ),
    Part(PREFERENCES, LLAMA, infer, 80),
    Part(
        "preferences by the reference",
        LLAMA,
        infer_by_reference,
        20,
        targets={"ratio": 20},
        against=(PREFERENCES,),
    ),
    Part(TRAINING, LLAVA, train_packed, 60, work="sft"),
    Part(
        "fine-tuning by the reference",
        LLAVA,
        tune_by_reference,
        20,
        work="sft",
        targets={"ratio": 2.5},
        against=(TRAINING,),
    ),
    Part(SUMMARIES, LLAVA, summarize, 75),
    Part("summaries by the reference", LLAVA, summarize_by_reference, 15, against=STEPS),
    Part(IMAGES, LLAVA, encode_item_images, 15),
    Part(TEXTS, LLAVA, encode_item_summaries, 15),
)


class Rehearsal:
    """Runs parts and writes their lines.

    Attributes:
        lines: The lines of finished parts, by name.
    """

    def __init__(
        self,
        write: Callable[[Mapping[str, Any]], None],
        memory_gb: Mapping[tuple[str, str], float],
    ) -> None:
        """Take a function that writes a line, and the computed gigabytes by model and work."""
        self.lines: dict[str, dict[str, Any]] = {}
        self._write, self._memory_gb = write, memory_gb

    def run(self, part: Part, options: Options) -> None:
        """Run a part and write its lines, or the error that ended it."""
        measured: Measured | dict[str, Measured] = {}
        try:
            measured = measure(part.side, options)
        except Exception as error:
            traceback.print_exc()
            self._write({"part": part.name, "error": f"{type(error).__name__}: {error}"})
        if not measured:
            release_memory()  # the traceback, which held the model, is gone now
        found = measured if isinstance(measured, dict) else {part.name: measured}
        for name, one in found.items():
            self.lines[name] = self._describe(name, part, one)
            self._write(self.lines[name])

    def _describe(self, name: str, part: Part, measured: Measured) -> dict[str, Any]:
        """Return the line of a part."""
        line = {"part": name, "model": part.model, **describe([measured])}
        line["cut_off"] = measured.count < measured.asked
        line["computed_gb"] = self._memory_gb[part.model, part.work]
        if part.against and all(one in self.lines for one in part.against):
            ours = combine([self.lines[one]["per_second"] for one in part.against])
            line["ratio"] = float(f"{ours / measured.rate:.3g}")
        line["targets"] = {
            field: {"target": target, "measured": line[field], "met": line[field] >= target}
            for field, target in part.targets.items()
            if field in line
        }
        return line


@app.command()
def main(
    small: Annotated[bool, typer.Option(help="Tiny models and counts, for a CPU.")] = False,
    minutes: Annotated[float, typer.Option(help="Time of all parts together.")] = 7.5,
    out: Annotated[Path | None, typer.Option(help="File to append the lines to.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help=f"Default: all. {', '.join(p.name for p in PARTS)}")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Folder for profiler traces; parts are cut off after 5 seconds."),
    ] = None,
) -> None:
    """Print one JSON line per part."""
    names = [one.name for one in PARTS]
    for name in part or []:
        if name not in names:
            raise typer.BadParameter(f"{name} is none of {', '.join(names)}", param_hint="--part")
    chosen = [one for one in PARTS if not part or one.name in part]
    lines = rehearse(SMALL if small else FULL, chosen, 60 * minutes, out, trace)
    if any("error" in line for line in lines):
        raise typer.Exit(1)


def rehearse(
    scale: Scale,
    parts: Sequence[Part],
    seconds: float,
    out: Path | None = None,
    trace: Path | None = None,
) -> list[Mapping[str, Any]]:
    """Run parts one after another, and return their lines.

    Args:
        scale: The size of the models and of the data.
        parts: The parts.
        seconds: After which no part starts; the last one is cut off.
        out: File to append the lines to.
        trace: Folder for profiler traces.
    """
    end, lines = time.monotonic() + seconds, list[Mapping[str, Any]]()
    out, trace = out and out.absolute(), trace and trace.absolute()
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)

    def write(line: Mapping[str, Any]) -> None:
        lines.append(line)
        typer.echo(json.dumps(line))
        sys.stdout.flush()
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    computed = compute_memory(scale.changes)
    settings = read_preset()
    with TemporaryDirectory() as name, contextlib.chdir(prepare(Path(name), scale, settings)):
        write(describe_device())
        rehearsal = Rehearsal(write, computed)
        for part in parts:
            left = end - time.monotonic()
            if left <= 0:
                write({"part": part.name, "error": "no time left"})
                continue
            options = Options(
                part.model,
                reference_count=scale.reference,
                sequences=count_sequences(part, scale.sizes),
                seconds=min(part.seconds, left, TRACED_SECONDS if trace else left),
            )
            with traced(trace, part.name):
                rehearsal.run(part, options)
        if not trace:
            write(extrapolate(rehearsal.lines, settings, scale))
    return lines


def count_sequences(part: Part, sizes: Sizes) -> int:
    """Return how many sequences or items a part has to process."""
    counts = {PREFERENCES: sizes.histories, SCORING: sizes.test, TRAINING: sizes.train}
    return counts.get((*part.against, part.name)[0], sizes.items)


@contextlib.contextmanager
def traced(folder: Path | None, name: str) -> Iterator[None]:
    """Write a profiler trace of the block into a folder; None: do nothing."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:  # CPU, and CUDA where there is one
        yield
    profiler.export_chrome_trace(str(folder / f"{name.replace(' ', '_')}.json.gz"))


def prepare(folder: Path, scale: Scale, settings: dict[str, Any]) -> Path:
    """Write settings, prompts, tables and models without weights into a folder; return it.

    The models are there under their names, relative to the folder.
    """
    changed = {**settings, "sft": settings["sft"] | {"epochs": EPOCHS}}
    if scale.new_tokens:
        for section in ("summarize_items", "infer_preferences"):
            changed[section] = settings[section] | {"max_new_tokens": scale.new_tokens}
    (folder / "params.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    (folder / "prompts.yaml").write_bytes(find_shipped("prompts.yaml").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(shapes.POCKET)
    tokenizer.model_max_length = settings["recommender"]["max_prompt_tokens"]  # warns above it
    ids = shapes.special_ids(tokenizer)
    image = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    llava = shapes.llava_config(changes=scale.changes, ids=ids | image)
    processor = shapes.llava_processor(tokenizer)
    shapes.save_without_weights(llava, processor, folder / LLAVA)
    llama = shapes.llama_config(changes=scale.changes, ids=ids)
    shapes.save_without_weights(llama, tokenizer, folder / LLAMA)
    history = settings["filter_sequences"]["max_history"]
    write_tables(folder / "data", scale.sizes, tokenizer, history)
    return folder


def read_preset() -> dict[str, Any]:
    """Read the shipped settings, with those of the preset."""
    preset = find_shipped("presets") / f"{PRESET}.yaml"
    settings: dict[str, Any] = yaml.safe_load(plan([preset], find_shipped("params.yaml"))[1])
    return settings


def compute_memory(changes: Mapping[str, int]) -> dict[tuple[str, str], float]:
    """Return the computed gigabytes by model and work, without slots and cached image features."""
    configs = {
        LLAVA: shapes.llava_config(changes=changes),
        LLAMA: shapes.llama_config(changes=changes),
    }
    computed: dict[tuple[str, str], float] = {}
    for name, case in zip(configs, memory.CASES[:2], strict=True):
        for line in memory.compute(case._replace(config=configs[name], preset=PRESET)):
            work = "sft" if line["work"].startswith("sft") else line["work"]
            computed.setdefault((name, work), line["total_gb"])  # the first sft is the preset's
    return computed


def describe_device() -> dict[str, Any]:
    """Return the first line: the machine, and its measured rate of matrix products."""
    device, machine = find_device(), describe_machine(LLAVA)
    rate = matrix_rate(device, DTYPES[machine["dtype"]])
    line = {"part": "machine", **machine, "matrix_tflops": float(f"{rate / 1e12:.3g}")}
    if device.type == "cuda":
        line["memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
    return line


def extrapolate(
    lines: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], scale: Scale
) -> dict[str, Any]:
    """Return the last line: the hours of the whole preset on MicroLens-50k.

    Args:
        lines: Of the parts, by name.
        settings: The preset's.
        scale: The size of the rehearsal.
    """
    stages: dict[str, dict[str, Any]] = {}
    for stage, (part, count) in count_work(settings).items():
        rate = lines[part]["per_second"] if part in lines else None
        hours = rate and float(f"{count / rate / 3600:.3g}")
        stages[stage] = {"part": part, "count": count, "per_second": rate, "hours": hours}
    missing = [stage for stage, found in stages.items() if found["hours"] is None]
    total = sum(found["hours"] or 0 for found in stages.values())
    return {
        "part": "extrapolation",
        "preset": PRESET,
        "stages": stages,
        "gpu_hours": None if missing else round(total, 2),
        "missing": missing,
        "assumed": [
            "the models are tiny: the hours say nothing of the preset's"
            if scale.changes
            else "random weights are as fast as trained ones",
            f"{SEQUENCES:,} sequences and {ITEMS:,} items; every item has title and image",
            "every response is as long as the settings allow",
            f"summaries and preferences of {scale.sizes.text_tokens} tokens, titles of"
            f" {TITLE_TOKENS}; half of the images 672 x 672 pixels, half 378 x 672",
            "pairs are spread evenly over items, as many per image as in the preset",
            "all negatives of the two samplings differ, so that no pair is asked once for both",
            "validation pairs cost as much as scored ones; each epoch costs as much as the first",
            "rates are those of a few examples, of which the first warm up and the last leave"
            " slots free",
            "one GPU; without loading weights, fetching images and the baselines",
        ],
    }


def count_work(settings: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Return the part that measures each stage, and the units of the stage in the whole preset."""
    filtered, sft = settings["filter_sequences"], settings["sft"]
    valid, test = (round(SEQUENCES * filtered[f"{split}_share"]) for split in ("valid", "test"))
    train = (SEQUENCES - valid - test) * (1 + filtered["train_negatives"])
    samplings = len(filtered["evaluation_sampling"])
    scored = sum(
        count * (1 + samplings * filtered[f"{split}_negatives"])
        for split, count in (("valid", valid), ("test", test))
    )
    checked = min(valid, sft["validation_sequences"]) * (1 + filtered["valid_negatives"])
    return {
        **{f"summarize_items, {step}": (step, ITEMS) for step in STEPS},
        "encode_items, images": (IMAGES, ITEMS),
        "encode_items, summaries": (TEXTS, ITEMS),
        "infer_preferences": (PREFERENCES, SEQUENCES),
        "sft, training": (TRAINING, sft["epochs"] * train),
        "sft, validation": (SCORING, count_validations(sft["epochs"]) * checked),
        "score": (SCORING, scored),
    }


def combine(rates: Sequence[float]) -> float:
    """Return the rate of steps that each unit passes one after another."""
    return 1 / sum(1 / rate for rate in rates)


if __name__ == "__main__":
    with report_errors_on_one_line():
        app()
