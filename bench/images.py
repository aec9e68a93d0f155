"""Speed, memory and output size of the stage ``fetch_images``.

    python -m bench.images --side 336 --side 672

Prints two JSON lines per image side. One compares decoding at a lower scale with a full decode: CPU
time, and the mean absolute difference, in levels of 255, of the stored image from one that is
decoded in full, shrunk and not stored as JPEG. The other is of the stage as a process of its own,
as in the pipeline, on all CPUs and, for the speedup, on one.

Images are synthetic photographs: soft shapes with sensor noise, as JPEG of 720 x 1,280 pixels. A
few are drawn and each is used for many items.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import typer
import yaml
from PIL import Image

from bench.data import run_stage
from mllm_msr.core.command import run
from mllm_msr.core.schemas import ImageSources
from mllm_msr.core.tables import write_rows
from mllm_msr.images import decoding

DRAWN = 20
SIZE = (720, 1280)  # pixels, as of a phone video
QUALITY = 85  # of JPEG
NOISE = 2.0  # standard deviation of a pixel's level
SPECTRAL_EXPONENT = 1.3  # a photograph's amplitudes fall about with the frequency


def main(
    side: Annotated[list[int], typer.Option(help="Pixels of the longer side.")] = [336, 672],  # noqa: B006
    images: Annotated[int, typer.Option(help="How many images.")] = 2_000,
) -> None:
    """Print two JSON lines for each side."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_images(folder, images)
        for pixels in side:
            typer.echo(json.dumps(compare_decoding(sorted((folder / "drawn").iterdir()), pixels)))
            typer.echo(json.dumps(measure(folder, images, pixels) | {"bytes_as_jpeg": size}))


def write_images(folder: Path, images: int) -> int:
    """Write images and the table ImageSources; return the mean bytes of an image."""
    (folder / "drawn").mkdir()
    files = [folder / "drawn" / f"{number}.jpg" for number in range(min(DRAWN, images))]
    for seed, file in enumerate(files):
        draw_photograph(seed).save(file, quality=QUALITY)
    rows = [
        {"item": f"{i:06}", "file": str(files[i % len(files)]), "member": None, "url": None}
        for i in range(images)
    ]
    write_rows(ImageSources, rows, folder / "image_sources.parquet")
    return sum(file.stat().st_size for file in files) // len(files)


def draw_photograph(seed: int) -> Image.Image:
    """Draw noise with a photograph's spectrum and correlated colours, and add sensor noise."""
    generator = np.random.default_rng(seed)
    width, height = SIZE
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = np.maximum(np.hypot(down, across), 1 / max(SIZE)) ** -SPECTRAL_EXPONENT
    waves = [
        np.fft.irfft2(amplitude * np.exp(2j * np.pi * generator.random(amplitude.shape)))
        for _ in range(4)
    ]
    levels = np.stack([waves[0] + 0.3 * colour for colour in waves[1:]], axis=-1)
    levels = 120 + 50 * (levels - levels.mean()) / levels.std()
    levels += generator.normal(0, NOISE, levels.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def measure(folder: Path, images: int, side: int) -> dict[str, Any]:
    """Run the stage on the images."""
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings["fetch_images"] |= {"image_side": side, "failed_share": 0.0}
    (folder / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    tables = {"image_sources": str(folder / "image_sources.parquet"), "raw": str(folder)}
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})  # the stage's process inherits it
    alone = run_stage(folder, "fetch_images", **tables)
    os.sched_setaffinity(0, cpus)
    ran = run_stage(folder, "fetch_images", **tables)
    table = folder / "fetch_images" / "images.parquet"
    return {
        "case": "fetch_images",
        "images": images,
        "image_side": side,
        "cpus": len(cpus),
        "speedup_over_one_cpu": round(alone["seconds"] / ran["seconds"], 2),
        "seconds_per_thousand": round(1000 * ran["seconds"] / images, 1),
        "cpu_seconds_per_thousand": round(1000 * ran["cpu_seconds"] / images, 1),
        "bytes_per_image": table.stat().st_size // images,
        "peak_mb": ran["peak_mb"],
    }


def compare_decoding(files: Sequence[Path], side: int) -> dict[str, Any]:
    """Encode images from a full decode and as the stage does."""
    with mock.patch.object(decoding, "MIN_DRAFT_RATIO", math.inf):
        full_seconds, full = encode_all(files, side)
        shrunk = [shrink(file, side) for file in files]
    seconds, drafts = encode_all(files, side)
    return {
        "case": "lower scale against full decode",
        "image_side": side,
        "full_cpu_ms": round(1000 * full_seconds / len(files), 1),
        "cpu_ms": round(1000 * seconds / len(files), 1),
        "ratio": round(full_seconds / seconds, 2),
        "full_difference": mean_difference(full, shrunk),
        "difference": mean_difference(drafts, shrunk),
    }


def encode_all(files: Sequence[Path], side: int) -> tuple[float, list[np.ndarray]]:
    """Return the CPU seconds that encoding takes, and the levels of the stored pixels."""
    start = time.process_time()
    encoded = [decoding.encode(file, side)[0] for file in files]
    seconds = time.process_time() - start
    return seconds, [np.asarray(decoding.decode(image), dtype=np.float64) for image in encoded]


def shrink(file: Path, side: int) -> np.ndarray:
    """Return the levels of an image that is shrunk from a full decode and not stored."""
    with Image.open(file) as image:
        shrunk = image.convert("RGB")
    shrunk.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(shrunk, dtype=np.float64)


def mean_difference(images: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Return the mean absolute difference of the levels of two lists of images."""
    differences = [
        np.abs(image - other).mean() for image, other in zip(images, others, strict=True)
    ]
    return round(float(np.mean(differences)), 2)


if __name__ == "__main__":
    run(main)
