"""Content kNN: items whose titles are like those of the history."""

from typing import TYPE_CHECKING

from mllm_msr.baselines.discovery import Baseline, Inputs
from mllm_msr.baselines.settings import TextParams
from mllm_msr.core.arrays import Floats

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Task


def score(task: "Task", settings: TextParams, inputs: Inputs) -> Floats:
    """Compare the candidate's title with those of the history (:func:`compare_with_history`).

    Raises:
        DataError: The table of items is of another run, or no title has a word.
    """
    from mllm_msr.baselines.texts import compare_with_history, read_texts

    assert inputs.items, "the stage baselines has it"
    titles = read_texts(inputs.items, "title", task.items, "baselines.content_knn")
    return compare_with_history(task, titles, settings)


BASELINE = Baseline(
    label="content kNN",
    stage="baselines",
    order=140,
    params=TextParams,
    score=score,
    grid=(
        {"analyzer": ["word"], "min_ngram": [1], "max_ngram": [1, 2]},
        {"analyzer": ["char_wb"], "min_ngram": [3, 4, 5], "max_ngram": [5]},
    ),
)
