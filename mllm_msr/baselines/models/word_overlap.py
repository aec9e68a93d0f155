"""Word overlap: how many words of the inferred preference the candidate's texts have.

It reads what the recommender reads, without a model: a fine-tuned one has to be above it.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mllm_msr.baselines.discovery import Baseline, Inputs
from mllm_msr.core.arrays import Floats
from mllm_msr.core.params import Section

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Task
    from mllm_msr.baselines.texts import Texts

log = logging.getLogger(__name__)

KEY = "text_baselines.word_overlap"


class WordOverlapParams(Section):
    """How words count."""

    idf: bool  # whether rare words count more


def score(task: "Task", settings: WordOverlapParams, inputs: Inputs) -> Floats:
    """Count the words of the preference in the candidate's summary and title, [candidates].

    Raises:
        DataError: A table is missing, empty or of another run, or no text has a word.
    """
    from mllm_msr.baselines.texts import Texts, preferences_of, read_texts

    assert inputs.items, "the stage text_baselines has it"
    assert inputs.summaries, "the stage text_baselines has it"
    assert inputs.preferences, "the stage text_baselines has it"
    summaries = read_texts(inputs.summaries, "summary", task.items, KEY)
    titles = read_texts(inputs.items, "title", task.items, KEY)
    both = [" ".join(pair) for pair in zip(summaries.values, titles.values, strict=True)]
    texts = Texts(both, "summary or title", summaries.where, summaries.fix)
    return count_words(task, texts, preferences_of(task, inputs.preferences, KEY), settings)


def count_words(
    task: "Task", texts: "Texts", preferences: Sequence[str], settings: WordOverlapParams
) -> Floats:
    """Count the words of the preference that stand in the candidate's texts.

    Each different word counts once, in lower case and of two letters or more. English stop words
    (scikit-learn's list) do not count, nor do words that occur in no item's text, such as most of a
    fixed wording ("the user appears to have a preference for"). With ``idf`` a word counts by its
    rarity, ``1 + ln((1 + items) / (1 + items with it))``, and not as 1.

    Args:
        task: What is known and asked; only candidates are read.
        texts: Summary and title of each item.
        preferences: [questions].
        settings: How words count.

    Returns:
        A count, or a sum of rarities, per candidate, [candidates].

    Raises:
        DataError: No text has a word.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

    from mllm_msr.baselines.texts import multiply, vectorize

    vectorizer = CountVectorizer(binary=True, stop_words="english", dtype=np.float64)
    items = vectorize(vectorizer, texts)
    wanted = sparse.csr_array(vectorizer.transform(preferences))
    if settings.idf:
        items = sparse.csr_array(TfidfTransformer(norm=None).fit_transform(items))
    if unmatched := np.count_nonzero(wanted.sum(axis=1) == 0):
        log.warning(
            "%s of %s preferences have no word of any item: all their candidates score 0",
            f"{unmatched:,}",
            f"{len(preferences):,}",
        )
    return multiply(task, wanted, items)


BASELINE = Baseline(
    label="word overlap",
    stage="text_baselines",
    order=70,
    params=WordOverlapParams,
    score=score,
    grid=({"idf": [False, True]},),
)
