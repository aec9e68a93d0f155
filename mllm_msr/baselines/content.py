"""Baselines that compare texts: nothing is trained, and nothing is known of other users.

- ``content_knn`` and ``content_knn_summary``: cosine of a candidate's TF-IDF vector with the mean
  of the history's, over titles or over summaries (Pazzani and Billsus 2007, "Content-Based
  Recommendation Systems"; TF-IDF as scikit-learn has it).
- ``word_overlap``: how many words of the inferred preference stand in the candidate's texts. It
  reads what the recommender reads, without a model: a fine-tuned one has to be above it.

Settings are those of :mod:`mllm_msr.core.params`; each function gives a score per candidate.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.preprocessing import normalize

from mllm_msr.baselines.counting import count_histories
from mllm_msr.baselines.task import Floats, Integers, Task
from mllm_msr.core import tables
from mllm_msr.core.errors import DataError

log = logging.getLogger(__name__)

CANDIDATES_AT_ONCE = 1 << 16  # rows of texts in memory at once
OF = {"title": tables.Items, "summary": tables.Summaries}  # which table has which text
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


def read_texts(path: Path, column: str, items: Sequence[str], baseline: str) -> Texts:
    """Read a text of each item; how many have none is logged.

    Args:
        path: The table Items for titles, Summaries for summaries.
        column: ``title`` or ``summary``.
        items: Names of the items, in the order wanted.
        baseline: Whom errors and the log name.

    Raises:
        DataError: The table is missing, breaks its model, is empty or lacks an item.
    """
    fix = _leave_out(baseline)
    found = {row["item"]: row[column] or "" for row in tables.read_rows(OF[column], path, "item")}
    missing = sum(item not in found for item in items)
    if missing:
        raise DataError(
            expected="a row for every item of the core",
            got=f"none for {missing:,} of {len(items):,}",
            where=str(path),
            fix=RERUN if found else fix,
        )
    values = [found[item] for item in items]
    if empty := sum(not value.strip() for value in values):
        log.warning(
            "%s: %s of %s items have no %s, and are scored as an empty text",
            *(baseline, f"{empty:,}", f"{len(items):,}", column),
        )
    return Texts(values, column, str(path), fix)


def read_preferences(path: Path, task: Task, baseline: str) -> list[str]:
    """Read the preference after the last block of each question's history, [questions].

    Raises:
        DataError: The table is missing, breaks its model, is empty or lacks a question's sequence.
    """
    rows = tables.read_rows(tables.Preferences, path, "sequence, block")
    last = {row["sequence"]: row["preference"] for row in rows}
    asked = task.questions.sequences.tolist()
    missing = sum(sequence not in last for sequence in asked)
    if missing:
        raise DataError(
            expected="a preference of every sequence of valid and test",
            got=f"none for {missing:,} of {len(asked):,}",
            where=str(path),
            fix=RERUN if last else _leave_out(baseline),
        )
    return [last[sequence] for sequence in asked]


def content_knn(
    task: Task, texts: Texts, *, analyzer: str, min_ngram: int, max_ngram: int
) -> Floats:
    """Give the cosine of the candidate's text with the mean of the texts of the history.

    Texts are TF-IDF vectors of length 1, with ``1 + ln(count)`` for the count of a term and ``1 +
    ln((1 + items) / (1 + items with it))`` for its rarity among the items of the core. An item
    without a text has a vector of zeros: it is no part of a mean's direction, and scores 0.

    Args:
        task: What is known and asked; only histories and candidates are read.
        texts: Of the items.
        analyzer: Whether terms are words (``word``) or characters within words (``char_wb``).
        min_ngram: Words or characters of the shortest term.
        max_ngram: Of the longest.

    Returns:
        A cosine per candidate in 0..1, [candidates].

    Raises:
        DataError: No text has a word.
    """
    vectorizer = TfidfVectorizer(
        analyzer=analyzer, ngram_range=(min_ngram, max_ngram), sublinear_tf=True
    )
    items = _vectorize(vectorizer, texts)
    # The cosine does not change with the length of a vector: a sum is as good as a mean.
    return _dot(task, normalize(count_histories(task) @ items), items)


def word_overlap(task: Task, texts: Texts, preferences: Sequence[str], *, idf: bool) -> Floats:
    """Count the words of the preference that stand in the candidate's texts.

    Each different word counts once, in lower case and of two letters or more. English stop words
    (scikit-learn's list) do not count, nor does what no item's text has, such as most words of a
    fixed wording ("the user appears to have a preference for").

    Args:
        task: What is known and asked; only candidates are read.
        texts: Summary and title of each item.
        preferences: [questions].
        idf: Whether a word counts by its rarity, ``1 + ln((1 + items) / (1 + items with it))``,
            and not as 1.

    Returns:
        A count, or a sum of rarities, per candidate, [candidates].

    Raises:
        DataError: No text has a word.
    """
    vectorizer = CountVectorizer(binary=True, stop_words="english", dtype=np.float64)
    items = _vectorize(vectorizer, texts)
    wanted = sparse.csr_array(vectorizer.transform(preferences))
    if idf:
        items = sparse.csr_array(TfidfTransformer(norm=None).fit_transform(items))
    if unmatched := np.count_nonzero(wanted.sum(axis=1) == 0):
        log.warning(
            "%s of %s preferences have no word of any item: all their candidates score 0",
            f"{unmatched:,}",
            f"{len(preferences):,}",
        )
    return _dot(task, wanted, items)


def score_texts(
    model: str,
    task: Task,
    filtered: Path,
    summaries: Path,
    preferences: Path,
    settings: Mapping[str, Any],
) -> Floats:
    """Score the candidates by a baseline of the section ``text_baselines``, [candidates].

    Args:
        model: ``content_knn_summary`` or ``word_overlap``.
        task: What is known and asked.
        filtered: Folder with the table Items.
        summaries: The table Summaries.
        preferences: The table Preferences.
        settings: The baseline's own.

    Raises:
        DataError: A table is missing, empty, of another run, or without a word.
    """
    described = read_texts(summaries, "summary", task.items, model)
    if model == "content_knn_summary":
        return content_knn(task, described, **settings)
    titles = read_texts(filtered / "items.parquet", "title", task.items, model)
    both = [" ".join(pair) for pair in zip(described.values, titles.values, strict=True)]
    texts = Texts(both, "summary or title", described.where, described.fix)
    return word_overlap(task, texts, read_preferences(preferences, task, model), **settings)


def _leave_out(baseline: str) -> str:
    """Say how to run without a baseline that has nothing to read."""
    section = "baselines" if baseline == "content_knn" else "text_baselines"
    return f"take {baseline} out of {section}.models: it would have nothing to read"


def _vectorize(vectorizer: CountVectorizer, texts: Texts) -> sparse.csr_array:
    """Fit a vectorizer to the texts; gives their vectors, [items, terms].

    Raises:
        DataError: No text has a word.
    """
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in texts.values):
        expected, got = f"an item whose {texts.name} has a word", f"{len(texts.values):,} without"
        raise DataError(expected=expected, got=got, where=texts.where, fix=texts.fix)
    return sparse.csr_array(vectorizer.fit_transform(texts.values))


def _dot(task: Task, questions: sparse.csr_array, items: sparse.csr_array) -> Floats:
    """Give the inner product of each candidate's item with its question, [candidates]."""
    asked = task.candidates
    scores = np.empty(len(asked.items))
    for start in range(0, len(scores), CANDIDATES_AT_ONCE):
        part = slice(start, start + CANDIDATES_AT_ONCE)
        scores[part] = _row_dots(questions, asked.questions[part], items, asked.items[part])
    return scores


def _row_dots(
    left: sparse.csr_array, rows: Integers, right: sparse.csr_array, others: Integers
) -> Floats:
    """Give the inner product of each row of one matrix with a row of the other, [rows]."""
    products: Floats = np.asarray(left[rows].multiply(right[others]).sum(axis=1)).ravel()
    return products
