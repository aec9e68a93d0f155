"""One function per baseline, by the name that its settings have in ``params.yaml``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mllm_msr.baselines import content, counting
from mllm_msr.baselines.task import Floats, Task

Scorer = Callable[..., Floats]

COUNTING: dict[str, Scorer] = {
    "recent_popularity": counting.recent_popularity,
    "item_knn": counting.item_knn,
    "markov": counting.markov,
}


def score_candidates(model: str, task: Task, settings: Mapping[str, Any], filtered: Path) -> Floats:
    """Give a baseline's score of every candidate; higher is likelier, [candidates].

    Args:
        model: Its name.
        task: What it may know and what is asked.
        settings: Its section of the settings.
        filtered: Folder of filter_sequences; content_knn reads the titles there.

    Raises:
        DataError: The data lack what the baseline needs.
        ModelError: The baseline needs a package that is not installed.
    """
    if model in COUNTING:
        return COUNTING[model](task, **settings)
    if model == "content_knn":
        titles = content.read_texts(filtered / "items.parquet", "title", task.items, model)
        return content.content_knn(task, titles, **settings)
    # Only here: it needs torch and an extra package.
    from mllm_msr.baselines import collaborative  # noqa: PLC0415

    learning: dict[str, Scorer] = {
        "fpmc": collaborative.fpmc,
        "gru4rec": collaborative.gru4rec,
        "sasrec": collaborative.sasrec,
        "bert4rec": collaborative.bert4rec,
    }
    return learning[model](task, **settings)
