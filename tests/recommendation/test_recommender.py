"""Recommendation of a finished run: what is retrieved, how it is ranked, and what is refused."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import duckdb
import pytest
import yaml

from mllm_msr.core.errors import DataError, ParamsError
from mllm_msr.recommendation.catalogue import UserHistories
from mllm_msr.recommendation.recommender import Query


def query(text: str, *values: object) -> list[tuple]:
    with duckdb.connect() as connection:
        return connection.execute(text, values).fetchall()


def items_of(user: str, run_folder: Path) -> list[str]:
    table = run_folder / "data/preprocess/interactions.parquet"
    rows = query(f"SELECT item FROM '{table}' WHERE user = ? ORDER BY timestamp, position", user)
    return [item for (item,) in rows]


@pytest.fixture(scope="module")
def user(run_folder: Path) -> str:
    """A test user."""
    table = run_folder / "data/filter_sequences/sequences.parquet"
    return query(f"SELECT min(user) FROM '{table}' WHERE split = 'test'")[0][0]


def test_the_history_of_a_user_is_all_of_it_the_target_included(recommender, user, run_folder):
    found = recommender.recommend(user=user, k=3)
    taken = items_of(user, run_folder)
    assert [each.item for each in found.history] == taken[-9:]
    assert found.user == user


def test_items_come_by_rank_and_p_yes_and_none_was_seen(recommender, user, run_folder):
    found = recommender.recommend(user=user, k=5).items
    assert [each.rank for each in found] == [1, 2, 3, 4, 5]
    assert all(a.p_yes >= b.p_yes for a, b in pairwise(found))
    assert not {each.item for each in found} & set(items_of(user, run_folder))
    assert all(0 < each.p_yes < 1 for each in found)
    assert all(1 <= each.retriever_rank <= 20 for each in found)


def test_seen_items_are_kept_on_request(recommender, user, run_folder):
    number = len(recommender.catalogue.titles)
    found = recommender.recommend(user=user, k=number, keep_seen=True).items
    assert set(items_of(user, run_folder)) <= {each.item for each in found}
    assert len(found) == number


def test_ranking_a_sequence_gives_the_scores_of_the_stage_score(recommender, run_folder):
    """The same history and candidates have the same log-odds, to the last digit."""
    filtered = run_folder / "data/filter_sequences"
    scores = run_folder / "data/score/scores.parquet"
    sequences = query(f"SELECT DISTINCT sequence FROM '{scores}' WHERE split = 'test'")
    for (sequence,) in sequences[:3]:
        history = query(
            f"SELECT item FROM '{filtered}/histories.parquet' WHERE sequence = ? ORDER BY position",
            sequence,
        )
        expected = dict(
            query(f"SELECT item, log_odds FROM '{scores}' WHERE sequence = ?", sequence)
        )
        found = recommender.rank([item for (item,) in history], list(expected))
        assert {each.item: each.log_odds for each in found.items} == expected


def test_preferences_are_those_of_the_stage(recommender, run_folder):
    histories = run_folder / "data/filter_sequences/histories.parquet"
    table = run_folder / "data/infer_preferences/preferences.parquet"
    history = [
        item
        for (item,) in query(f"SELECT item FROM '{histories}' WHERE sequence = 0 ORDER BY position")
    ]
    expected = query(f"SELECT preference FROM '{table}' WHERE sequence = 0 ORDER BY block")
    assert recommender.preference(history) == [text for (text,) in expected]


def test_a_history_alone_suffices(recommender):
    first, second = list(recommender.catalogue.titles)[:2]
    found = recommender.recommend(history=[first, second], k=4)
    assert found.user is None
    assert len(found.items) == 4
    assert found.preferences
    assert not {first, second} & {each.item for each in found.items}


def test_an_empty_history_gets_popular_items(recommender):
    found = recommender.recommend(history=[], k=3)
    counts = recommender.catalogue.popularity
    best = sorted(counts, key=lambda item: (-counts[item], item))[:3]
    assert [each.item for each in found.items] == best
    assert {(each.p_yes, each.retriever) for each in found.items} == {(None, "popularity")}
    assert not found.preferences


@pytest.mark.slow
def test_all_users_get_what_each_gets_alone(recommender, user):
    every = list(recommender.recommend_all(k=2))
    users = [each.user for each in every]
    assert users == sorted(users)
    assert len(users) == 40
    alone = recommender.recommend(user=user, k=2)
    together = next(each for each in every if each.user == user)
    assert [each.item for each in together.items] == [each.item for each in alone.items]
    assert together.preferences == alone.preferences


def test_users_who_have_seen_nearly_all_get_fewer(in_run_folder, tmp_path):
    from mllm_msr import Recommender

    settings = yaml.safe_load((in_run_folder / "params.yaml").read_text(encoding="utf-8"))
    settings["recommender"]["model"] = None
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with Recommender.load(params=params, retriever="popularity") as loaded:
        whole = len(loaded.catalogue.titles)
        histories = dict(loaded._histories.all())
        found = {each.user: len(each.items) for each in loaded.recommend_all(k=whole)}
        assert found == {user: whole - len(set(seen)) for user, seen in histories.items()}
        first = next(iter(histories))
        histories[first] = list(loaded.catalogue.titles)
        loaded._histories = SimpleNamespace(all=histories.items)
        assert first not in {each.user for each in loaded.recommend_all(k=1)}
        with pytest.raises(ParamsError, match="k: expected 1 to"):
            list(loaded.recommend_all(k=0))


def test_queries_together_get_what_each_gets_alone(recommender, user):
    first, second, third = list(recommender.catalogue.titles)[:3]
    text = recommender.preference([first, second])[-1]
    answers = recommender.answer(
        [
            Query(user=user, k=3),
            Query(user="nobody"),
            Query(history=[first, second], k=2, keep_seen=True),
            Query(history=[first, second], candidates=[second, third], k=2),
            Query(preference=text, candidates=[second, third], k=2),
            Query(history=[first, second], candidates=()),
            Query(history=[], k=2),
            Query(preference=text, candidates=[]),
            Query(user=user, candidates=[third], k=1),
        ]
    )
    ranked = recommender.rank([first, second], [second, third])
    assert answers[0] == recommender.recommend(user=user, k=3)
    assert isinstance(answers[1], DataError)
    assert answers[2] == recommender.recommend(history=[first, second], k=2, keep_seen=True)
    assert answers[3] == ranked
    assert answers[4].items == ranked.items
    assert answers[5].preferences == recommender.preference([first, second])
    assert answers[6] == recommender.recommend(history=[], k=2)
    assert isinstance(answers[7], ParamsError)
    assert [each.item for each in answers[8].items] == [third]
    assert answers[8].history == answers[0].history


def test_users_are_sorted(recommender, user):
    assert recommender.users() == sorted({*recommender.users(), user})
    assert len(recommender.users()) == 40


def test_a_repeated_candidate_is_ranked_once(recommender):
    first, second = list(recommender.catalogue.titles)[:2]
    found = recommender.rank([first], [second, first, second])
    assert sorted(each.item for each in found.items) == [first, second]
    assert {each.retriever for each in found.items} == {None}


def test_an_unknown_user_is_refused_with_the_closest_one(recommender):
    with pytest.raises(DataError, match=r"got 'u0001x'; .* the closest one is 'u0001\d|u00001'"):
        recommender.recommend(user="u0001x")


def test_an_unknown_item_is_refused_with_the_closest_one(recommender):
    known = next(iter(recommender.catalogue.titles))
    for ask in (
        lambda: recommender.recommend(history=[known, f"{known}x"]),
        lambda: recommender.rank([known], [f"{known}x"]),
        lambda: recommender.preference([f"{known}x"]),
    ):
        with pytest.raises(DataError, match=f"got '{known}x'; the closest id is '{known}'"):
            ask()


@pytest.mark.parametrize("k", [0, -1, 10_000])
def test_a_number_of_items_that_cannot_be_is_refused(recommender, k):
    with pytest.raises(ParamsError, match=r"k: expected 1 to \d\d, the items"):
        recommender.recommend(history=[next(iter(recommender.catalogue.titles))], k=k)


def test_neither_user_nor_history_is_refused(recommender):
    with pytest.raises(ParamsError, match="a user or a history"):
        recommender.recommend()


def test_nothing_to_rank_is_refused(recommender):
    known = next(iter(recommender.catalogue.titles))
    with pytest.raises(ParamsError, match="history: expected at least one item"):
        recommender.rank([], [known])
    with pytest.raises(ParamsError, match="candidates: expected at least one item"):
        recommender.rank([known], [])
    with pytest.raises(ParamsError, match="expected a history"):
        recommender.preference([])


def test_more_items_than_candidates_are_retrieved_where_asked_for(recommender, user):
    assert len(recommender.recommend(user=user, k=30).items) == 30


@pytest.mark.parametrize("retriever", ["popularity", "gru4rec_f"])
def test_another_retriever_is_named(in_run_folder, tmp_path, retriever):
    from mllm_msr import Recommender

    settings = yaml.safe_load((in_run_folder / "params.yaml").read_text(encoding="utf-8"))
    settings["recommender"]["model"] = None
    settings["feature_baselines"]["gru4rec_f"] |= {"epochs": 1, "features": []}
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(settings), encoding="utf-8")
    if retriever == "gru4rec_f":
        from stages.encode_items import encode_items

        encode_items()
    with Recommender.load(params=params, retriever=retriever) as loaded:
        found = loaded.recommend(history=[*loaded.catalogue.titles][:2], k=3)
        assert {each.retriever for each in found.items} == {retriever}
        assert [each.retriever_rank for each in found.items] == [1, 2, 3]
        assert {each.p_yes for each in found.items} == {None}
        with pytest.raises(ParamsError, match="a run with a model"):
            loaded.preference([*loaded.catalogue.titles][:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retriever": "markov"}, "the retriever: expected one of popularity, .*got 'markov'"),
        ({"candidates": 0}, "candidates: expected at least 1; got 0"),
    ],
)
@pytest.mark.usefixtures("in_run_folder")
def test_settings_that_cannot_be_are_refused(change, message):
    from mllm_msr import Recommender

    with pytest.raises(ParamsError, match=message):
        Recommender.load(**change)


def test_items_outside_the_catalogue_are_left_out_of_histories(recommender, user, run_folder):
    table = run_folder / "data/preprocess/interactions.parquet"
    left_out = items_of(user, run_folder)[0]
    titles = {k: v for k, v in recommender.catalogue.titles.items() if k != left_out}
    catalogue = type(recommender.catalogue)(titles, {}, {})
    histories = UserHistories(table, catalogue)
    assert histories.of(user) == items_of(user, run_folder)[1:]
    assert dict(histories.all())[user] == histories.of(user)
    histories.close()
