"""Fixtures of the tests of the method's steps."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from families import Family
    from small_world import SmallWorld

    from mllm_msr.method.examples import RecommenderInputs


@pytest.fixture
def recommender(family: "Family", world: "SmallWorld") -> "Iterator[RecommenderInputs]":
    """Open each family's recommender on the small world."""
    from small_world import recommender_settings

    from mllm_msr.method.examples import open_recommender
    from mllm_msr.method.prompts import load_prompts

    settings = recommender_settings(family.folder, image=family.has_images)
    tables = (world.preferences, world.items, world.images)
    with open_recommender(settings, load_prompts("recommender"), *tables) as opened:
        yield opened
