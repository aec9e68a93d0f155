"""Encode every item as two vectors: one of its image, one of its summary."""

from pathlib import Path

import typer

from mllm_msr.core.command import (
    Debug,
    ImagesPath,
    ItemsPath,
    OutPath,
    Params,
    SummariesPath,
    report_written,
    run,
    write_empty_table,
)
from mllm_msr.core.params import EncodeItemsParams, PreprocessParams, load_params
from mllm_msr.pocket.identity import refuse_pocket_model

ROWS_PER_GROUP = 100  # a vector may have thousands of numbers


def encode_items(
    items: ItemsPath = Path("data/filter_sequences/items.parquet"),
    images: ImagesPath = Path("data/fetch_images/images.parquet"),
    summaries: SummariesPath = Path("data/summarize_items/summaries.parquet"),
    out: OutPath = Path("data/encode_items"),
    params: Params = Path("params.yaml"),
    debug: Debug = False,
) -> None:
    """Compute the item features of the feature baselines; no response is generated or stored.

    Example: python -m stages.encode_items --out data/encode_items
    """
    from mllm_msr.core.schemas import Features
    from mllm_msr.core.tables import write_rows
    from mllm_msr.images.gallery import Gallery

    settings = load_params(EncodeItemsParams, params)
    path = out / "features.parquet"
    if settings.model is None:
        write_empty_table("encode_items.model", Features, path)
        return
    refuse_pocket_model("encode_items.model", settings.model, load_params(PreprocessParams, params))
    # Imported here, since they load torch.
    from mllm_msr.baselines.feature_extraction import encode_items as encode
    from mllm_msr.baselines.feature_extraction import read_summaries
    from mllm_msr.engines.encoding import Encoder
    from mllm_msr.engines.local import LocalModel

    texts = read_summaries(items, summaries)
    with Gallery(images) as gallery:
        model = LocalModel(Encoder(settings.model, settings.revision, gallery))
        features = encode(model, gallery, texts)
    written = write_rows(Features, (row._asdict() for row in features), path, ROWS_PER_GROUP)
    image_refs = sum(row.image is not None for row in features)
    typer.echo(f"{image_refs:,} of {written:,} items have features of an image")
    report_written(path, written, "items with features")


if __name__ == "__main__":
    run(encode_items)
