"""The paper's published figures, drawn faintly in the figures of studies on the paper's datasets.

This project neither measured nor claims them. There are two kinds, see ``SOURCES``: figures that
others transcribed from the paper's tables, and figures read off the paper's plots. Tables and plots
disagree on which Amazon set has which values; they are listed here as given. The paper's table has
more rows than are known to us.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

DATASETS = ("MicroLens", "Baby", "Games")  # the order of every list of values below
AMAZON = {"Baby_Products": "Baby", "Video_Games": "Games"}
# What decides which questions are asked, as in the presets of the paper's protocol: with other
# values figures are not comparable with the paper's.
PROTOCOL = {
    "min_user_interactions": 6,
    "min_item_interactions": 5,
    "min_history": 5,
    "max_history": 5,
    "history": "popular",
    "target": "popular",
    "split": "users",
    "valid_share": 0.1,
    "test_share": 0.1,
    "fold": None,
    "budget": {"train": None, "valid": None, "test": None, "interactions": "all"},
    "test_negatives": 20,
}
SECOND_HAND = "the paper, its own protocol, second-hand"
READ_OFF = "the paper, its own protocol, read off its figure"
SOURCES = {
    "table": SECOND_HAND,
    "ablation": READ_OFF,
    "block-size": READ_OFF,
    "image-summary": f"{SECOND_HAND}; image features of VGG19",
}


class Published(NamedTuple):
    """One experiment's figures in the paper; values in the order of ``DATASETS``."""

    study: str
    variant: str  # a variant's name, or a scorer's
    metric: str
    values: tuple[float, float, float]


PUBLISHED = (
    Published("table", "full", "auc", (0.8317, 0.8569, 0.8439)),
    Published("table", "full", "hr@5", (0.7823, 0.7958, 0.7742)),
    Published("table", "full", "mrr@5", (0.6038, 0.6377, 0.6325)),
    Published("table", "zero-shot", "auc", (0.5275, 0.5586, 0.5357)),
    Published("table", "zero-shot", "hr@5", (0.2821, 0.3482, 0.3324)),
    Published("table", "zero-shot", "mrr@5", (0.1733, 0.2096, 0.1873)),
    Published("table", "tallrec", "auc", (0.8125, 0.8216, 0.8179)),
    Published("table", "tallrec", "hr@5", (0.7123, 0.7431, 0.7236)),
    Published("table", "tallrec", "mrr@5", (0.5822, 0.6015, 0.5738)),
    Published("ablation", "full", "auc", (0.832, 0.844, 0.857)),
    Published("ablation", "direct", "auc", (0.809, 0.812, 0.817)),
    Published("ablation", "no-image-summaries", "auc", (0.786, 0.799, 0.803)),
    Published("block-size", "1", "auc", (0.761, 0.781, 0.771)),
    Published("block-size", "2", "auc", (0.813, 0.793, 0.823)),
    Published("block-size", "3", "auc", (0.832, 0.844, 0.857)),
    Published("block-size", "4", "auc", (0.827, 0.843, 0.848)),
    Published("block-size", "5", "auc", (0.802, 0.813, 0.822)),
    Published("image-summary", "gru4rec_image", "auc", (0.7154, 0.7383, 0.7532)),
    Published("image-summary", "gru4rec_summary", "auc", (0.7281, 0.7318, 0.7451)),
)


def find_published(study: str, variant: str, params: Mapping[str, Any]) -> dict[str, float]:
    """Return the paper's figures of an experiment by metric; none on other data or questions."""
    dataset = _dataset(params)
    return {
        each.metric: each.values[DATASETS.index(dataset)]
        for each in PUBLISHED
        if dataset and (each.study, each.variant) == (study, variant)
    }


def _dataset(params: Mapping[str, Any]) -> str:
    """Return the paper's name of the dataset; empty if data or protocol are not the paper's."""
    preprocess = params["preprocess"]
    if preprocess["source"] == "microlens":
        dataset = "MicroLens"
    elif preprocess["source"] == "amazon":
        dataset = AMAZON.get(preprocess["amazon"]["category"], "")
    else:
        return ""
    filters = params["filter_sequences"]
    return dataset if all(filters[key] == value for key, value in PROTOCOL.items()) else ""
