"""Texts of items and users as vectors, for the baselines that compare texts.

Terms and their weights are scikit-learn's. Nothing is trained, and nothing is known of other users.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize

from mllm_msr.baselines.counts import count_histories
from mllm_msr.baselines.settings import TextParams
from mllm_msr.baselines.task import Task
from mllm_msr.core import schemas, tables
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.errors import DataError

log = logging.getLogger(__name__)

CANDIDATES_AT_ONCE = 1 << 16  # rows of texts in memory at once
OF = {"title": schemas.Items, "summary": schemas.Summaries}  # which table has which text
RERUN = "run the stages again with dvc repro"


@dataclass(frozen=True)
class Texts:
    """A text of each item of a task.

    Attributes:
        values: [items]; empty where an item has none.
        name: What the log and errors call one: ``title``, ``summary``.
        where: The file that errors name.
        fix: What to do where no text has a word.
    """

    values: Sequence[str]
    name: str
    where: str
    fix: str


def read_texts(path: Path, column: str, items: Sequence[str], key: str) -> Texts:
    """Read a text of each item; how many have none is logged.

    Args:
        path: The table Items for titles, Summaries for summaries.
        column: ``title`` or ``summary``.
        items: Names of the items, in the order wanted.
        key: Section and name of the baseline's settings, for errors and the log.

    Raises:
        DataError: The table is missing, breaks its model, is empty or lacks an item.
    """
    found = {row["item"]: row[column] or "" for row in tables.read_rows(OF[column], path, "item")}
    _refuse_missing(found, items, "a row for every item of the k-core", path, key)
    values = [found[item] for item in items]
    if empty := sum(not value.strip() for value in values):
        log.warning(
            "%s: %s of %s items have no %s, and are scored as an empty text",
            *(key.rpartition(".")[2], f"{empty:,}", f"{len(items):,}", column),
        )
    return Texts(values, column, str(path), _leave_out(key))


def preferences_of(task: Task, path: Path, key: str) -> list[str]:
    """Return the last preference of each question's sequence, [questions].

    Args:
        task: Whose questions are meant.
        path: The table Preferences.
        key: Section and name of the baseline's settings, for errors.

    Raises:
        DataError: The table is missing, breaks its model, is empty or lacks a question's sequence.
    """
    last = tables.read_last_preferences(path)
    asked = task.questions.sequences.tolist()
    _refuse_missing(last, asked, "a preference of every sequence of valid and test", path, key)
    return [last[sequence] for sequence in asked]


def compare_with_history(task: Task, texts: Texts, settings: TextParams) -> Floats:
    """Return the cosine of the candidate's text with the mean of the texts of the history.

    Texts are TF-IDF vectors of length 1, with ``1 + ln(count)`` for the count of a term and ``1 +
    ln((1 + items) / (1 + items with it))`` for its rarity among the items of the k-core. An item
    without a text has a vector of zeros: it is no part of a mean's direction, and scores 0
    (Pazzani and Billsus 2007, "Content-Based Recommendation Systems").

    Args:
        task: What is known and asked; only histories and candidates are read.
        texts: Of the items.
        settings: Which terms are compared.

    Returns:
        A cosine per candidate in 0..1, [candidates].

    Raises:
        DataError: No text has a word.
    """
    vectorizer = TfidfVectorizer(
        analyzer=settings.analyzer,
        ngram_range=(settings.min_ngram, settings.max_ngram),
        sublinear_tf=True,
    )
    items = vectorize(vectorizer, texts)
    # The cosine does not change with the length of a vector: a sum is as good as a mean.
    return multiply(task, normalize(count_histories(task) @ items), items)


def vectorize(vectorizer: CountVectorizer, texts: Texts) -> sparse.csr_array:
    """Fit a vectorizer to the texts and return their vectors, [items, terms].

    Raises:
        DataError: No text has a word.
    """
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in texts.values):
        expected, got = f"an item whose {texts.name} has a word", f"{len(texts.values):,} without"
        raise DataError(expected=expected, got=got, where=texts.where, fix=texts.fix)
    return sparse.csr_array(vectorizer.fit_transform(texts.values))


def multiply(task: Task, questions: sparse.csr_array, items: sparse.csr_array) -> Floats:
    """Return the inner product of each candidate's item with its question, [candidates]."""
    asked = task.candidates
    scores = np.empty(len(asked.items))
    for start in range(0, len(scores), CANDIDATES_AT_ONCE):
        part = slice(start, start + CANDIDATES_AT_ONCE)
        scores[part] = _row_dots(questions, asked.questions[part], items, asked.items[part])
    return scores


def _row_dots(
    left: sparse.csr_array, rows: Integers, right: sparse.csr_array, others: Integers
) -> Floats:
    """Return the inner product of each row of one matrix with a row of the other, [rows]."""
    products: Floats = np.asarray(left[rows].multiply(right[others]).sum(axis=1)).ravel()
    return products


def _refuse_missing(
    known: Collection[object], wanted: Sequence[object], expected: str, path: Path, key: str
) -> None:
    """Refuse a table that lacks rows: it is of another run, or its stage was left out."""
    missing = sum(each not in known for each in wanted)
    if missing:
        raise DataError(
            expected=expected,
            got=f"none for {missing:,} of {len(wanted):,}",
            where=str(path),
            fix=RERUN if known else _leave_out(key),
        )


def _leave_out(key: str) -> str:
    """Return how to run without a baseline that has nothing to read."""
    section, _, baseline = key.partition(".")
    return f"take {baseline} out of {section}.models: it would have nothing to read"
