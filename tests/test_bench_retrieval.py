"""The benchmark of retrieval finds what a full sort finds."""

import numpy as np
import pytest

from bench import retrieval


def test_blocks_find_the_items_of_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "USERS_AT_ONCE", 3)
    monkeypatch.setattr(retrieval, "ITEMS_AT_ONCE", 17)
    generator = np.random.default_rng(0)
    users, items = (generator.standard_normal((n, 8), dtype=np.float32) for n in (7, 60))
    expected = np.argsort(-(users @ items.T), axis=1)[:, :20]
    np.testing.assert_array_equal(retrieval.find_first(users, items, 20), expected)
