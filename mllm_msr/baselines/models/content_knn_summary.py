"""Content kNN on summaries: items whose summaries are like those of the history."""

from typing import TYPE_CHECKING

from mllm_msr.baselines.discovery import Baseline, Inputs
from mllm_msr.baselines.settings import TextParams
from mllm_msr.core.arrays import Floats

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Task


def score(task: "Task", settings: TextParams, inputs: Inputs) -> Floats:
    """Compare the candidate's summary with those of the history (:func:`compare_with_history`).

    Raises:
        DataError: The table of summaries is empty or of another run, or no summary has a word.
    """
    from mllm_msr.baselines.texts import compare_with_history, read_texts

    assert inputs.summaries, "the stage text_baselines has it"
    key = "text_baselines.content_knn_summary"
    summaries = read_texts(inputs.summaries, "summary", task.items, key)
    return compare_with_history(task, summaries, settings)


BASELINE = Baseline(
    label="content kNN on summaries",
    stage="text_baselines",
    order=60,
    params=TextParams,
    score=score,
    grid=(
        {"analyzer": ["word"], "min_ngram": [1], "max_ngram": [1, 2]},
        {"analyzer": ["char_wb"], "min_ngram": [3, 4, 5], "max_ngram": [5]},
    ),
)
