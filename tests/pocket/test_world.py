"""The pocket world: deterministic, predictable by its oracle, described by two modalities."""

from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mllm_msr.pocket import drawing
from mllm_msr.pocket.raw import write_oracle, write_raw
from mllm_msr.pocket.world import (
    ATTRIBUTES,
    FIRST_TIMESTAMP,
    IMAGE_ATTRIBUTES,
    LATE_SHARE,
    TEXT_ATTRIBUTES,
    User,
    World,
    make_world,
)

NEGATIVES = 20


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(seed=11, users=400, items=600)


def mean_auc(world: World, score: dict[str, np.ndarray]) -> float:
    """Return the mean AUC of the last interaction against uniform untouched items."""
    generator = np.random.default_rng(0)
    labels = [1] + [0] * NEGATIVES
    values = []
    for user in world.users:
        others = np.setdiff1d(np.arange(len(world.items)), user.items)
        negatives = generator.choice(others, NEGATIVES, replace=False)
        values.append(roc_auc_score(labels, score[user.user][[user.items[-1], *negatives]]))
    return float(np.mean(values))


def taken_values(user: User, world: World, name: str, last: int) -> list[str]:
    return [world.items[number].values[name] for number in user.items[-last:]]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        small = make_world(seed=5, users=10, items=50)
        write_raw(small, tmp_path / name)
        write_oracle(small, tmp_path / name / "oracle.parquet")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 50 + 3
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_another_seed_makes_another_catalogue_and_other_users() -> None:
    one, two = make_world(1, 10, 50), make_world(2, 10, 50)
    assert [i.values for i in one.items] != [i.values for i in two.items]
    assert [u.items for u in one.users] != [u.items for u in two.users]


def test_the_oracle_scores_higher_than_popularity(world: World) -> None:
    taken = Counter(number for user in world.users for number in user.items[:-1])
    counts = np.array([taken[number] for number in range(len(world.items))])
    oracle = mean_auc(world, {user.user: user.utility for user in world.users})
    popularity = mean_auc(world, {user.user: counts for user in world.users})
    assert 0.92 <= oracle <= 0.99
    assert 0.55 < popularity < 0.8


def test_interactions_have_a_long_tail(world: World) -> None:
    """A tenth of the items has two fifths of the interactions, as of MicroLens-50k (.37)."""
    taken = Counter(number for user in world.users for number in user.items)
    counts = np.sort([taken[number] for number in range(len(world.items))])[::-1]
    assert 0.3 < counts[: len(counts) // 10].sum() / counts.sum() < 0.5
    assert np.median(counts) < 0.75 * np.mean(counts)


def test_no_item_is_taken_before_it_arrives(world: World) -> None:
    late = int((world.arrivals > FIRST_TIMESTAMP).sum())
    assert late == LATE_SHARE * len(world.items)
    for user in world.users:
        assert all(world.arrivals[user.items] <= user.timestamps)


def test_late_items_have_fewer_interactions(world: World) -> None:
    taken = Counter(number for user in world.users for number in user.items)
    counts = np.array([taken[number] for number in range(len(world.items))])
    order = np.argsort(world.arrivals, kind="stable")
    half, quarter = len(order) // 2, len(order) // 4
    assert counts[order[-quarter:]].mean() < 0.6 * counts[order[:half]].mean()


def test_recent_choices_follow_the_last_taste(world: World) -> None:
    shares = [
        np.mean([value == liked for value in taken_values(user, world, name, last=3)])
        for user in world.users
        for name, liked in user.taste.items()
    ]
    assert np.mean(shares) > 0.45  # chance is an eighth


def test_old_choices_predict_the_target_worse_than_recent_ones(world: World) -> None:
    def share_never_shown(part: slice) -> float:
        shown = [
            any(world.items[number].values[name] == liked for number in user.items[part])
            for user in world.users
            for name, liked in user.taste.items()
        ]
        return 1 - float(np.mean(shown))

    assert share_never_shown(slice(0, 3)) > share_never_shown(slice(-3, None)) + 0.05


def test_users_choose_each_item_once_and_in_order_of_time(world: World) -> None:
    for user in world.users:
        assert len(set(user.items)) == len(user.items)
        assert all(a < b for a, b in zip(user.timestamps, user.timestamps[1:], strict=False))


def test_a_taste_has_image_and_text_attributes(world: World) -> None:
    for user in world.users:
        assert set(user.taste) & set(IMAGE_ATTRIBUTES)
        assert set(user.taste) & set(TEXT_ATTRIBUTES)


def test_the_text_has_no_image_attribute(world: World) -> None:
    shown = {value for values in IMAGE_ATTRIBUTES.values() for value in values}
    for item in world.items:
        words = f"{item.title} {item.description or ''}".lower()
        assert not shown & set(words.replace(",", " ").replace(".", " ").split())


def test_every_title_has_the_series_and_the_maker(world: World) -> None:
    for item in world.items:
        assert item.values["series"] in item.title
        assert item.values["maker"] in item.title


def test_the_image_depends_on_image_attributes_only() -> None:
    def paint(values: dict[str, str]) -> bytes:
        shown = {name: values[name] for name in IMAGE_ATTRIBUTES}
        return drawing.draw_item(**shown, generator=np.random.default_rng(3)).tobytes()

    first = {name: values[0] for name, values in ATTRIBUTES.items()}
    for name, values in ATTRIBUTES.items():
        changes = paint(first) != paint(first | {name: values[1]})
        assert changes == (name in IMAGE_ATTRIBUTES)


def test_no_two_images_are_equal(world: World) -> None:
    assert len({item.draw().tobytes() for item in world.items}) == len(world.items)


def test_the_raw_files_are_complete(tmp_path: Path) -> None:
    small = make_world(seed=5, users=20, items=60)
    rows = write_raw(small, tmp_path / "raw")
    assert rows == sum(len(user.items) for user in small.users)
    items = duckdb.read_csv(str(tmp_path / "raw" / "items.csv")).fetchall()
    assert all((tmp_path / "raw" / image).is_file() for *_, image in items)
    assert all(title for _, title, *_ in items)
    taken = duckdb.read_csv(str(tmp_path / "raw" / "interactions.csv")).fetchall()
    assert {item for _, item, _ in taken} <= {item for item, *_ in items}


def test_the_oracle_has_every_user_and_item(tmp_path: Path) -> None:
    small = make_world(seed=5, users=10, items=50)
    assert write_oracle(small, tmp_path / "oracle.parquet") == 500
    table = duckdb.read_parquet(str(tmp_path / "oracle.parquet"))
    assert table.columns == ["user", "item", "utility"]
    first = small.users[0]
    rows = dict(table.filter(f"\"user\" = '{first.user}'").project("item, utility").fetchall())
    assert rows[small.items[7].item] == pytest.approx(first.utility[7])
