"""The catalogue and the users' histories of a finished run, for recommendation.

Histories here hold every interaction of a user, the held-out targets included: recommendation is
about what comes after them. Evaluation never reads this module.
"""

import bisect
import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import duckdb

from mllm_msr.core.errors import UnknownError
from mllm_msr.core.schemas import Interactions, Items, Popularity, Summaries
from mllm_msr.core.tables import read_rows, read_table

IDS_COMPARED = 500  # before and after the place of an unknown id, to find the closest one
ORDER = "timestamp NULLS FIRST, position, item"  # of a user's interactions, oldest first


@dataclass(frozen=True)
class Catalogue:
    """The items that can be recommended: those of the k-core.

    Attributes:
        titles: By item, in the order of ids; None for an item without a title.
        summaries: By item; empty where the run made none.
        popularity: Known interactions by item.
    """

    titles: Mapping[str, str | None]
    summaries: Mapping[str, str]
    popularity: Mapping[str, int]

    def extended(
        self, titles: Mapping[str, str | None], summaries: Mapping[str, str]
    ) -> "Catalogue":
        """Return the catalogue with further items, which have no known interactions."""
        return Catalogue(
            {**self.titles, **titles}, {**self.summaries, **summaries}, self.popularity
        )

    def check(self, items: Collection[str], where: str) -> None:
        """Refuse items that are not in the catalogue.

        Args:
            items: Ids.
            where: What named them, for the error.

        Raises:
            UnknownError: One is unknown; names a similar id.
        """
        for item in items:
            if item not in self.titles:
                place = bisect.bisect_left(self._ids, item)
                near = self._ids[max(0, place - IDS_COMPARED) : place + IDS_COMPARED]
                close = difflib.get_close_matches(item, near, n=1, cutoff=0)
                raise UnknownError(
                    expected="an item of the catalogue",
                    got=repr(item),
                    where=where,
                    fix=f"the closest id is {close[0]!r}",
                )

    @cached_property
    def _ids(self) -> list[str]:
        """The ids, sorted."""
        return sorted(self.titles)


def read_catalogue(data: Path) -> Catalogue:
    """Read the catalogue of a run.

    Args:
        data: Folder of the stages' outputs.

    Raises:
        DataError: A table is missing or breaks its model.
    """
    filtered = data / "filter_sequences"
    items = read_rows(Items, filtered / "items.parquet", order="item")
    popularity = read_rows(Popularity, filtered / "popularity.parquet", order="item")
    summaries = read_rows(Summaries, data / "summarize_items/summaries.parquet", order="item")
    return Catalogue(
        {row["item"]: row["title"] for row in items},
        {row["item"]: row["summary"] for row in summaries},
        {row["item"]: row["interactions"] for row in popularity},
    )


class UserHistories:
    """The interactions of every user with items of the catalogue, held in memory by user."""

    def __init__(self, interactions: Path, catalogue: Catalogue) -> None:
        """Read the table of the stage preprocess.

        Raises:
            DataError: It is missing or breaks its model.
        """
        self._catalogue = catalogue
        self._connection = duckdb.connect()
        read_table(Interactions, self._connection, interactions, "interactions")
        self._connection.execute(
            f"CREATE TABLE histories AS SELECT user, list(item ORDER BY {ORDER}) AS items"
            " FROM interactions GROUP BY user ORDER BY user"
        )
        # To scan the file takes longer than all else that a request with stored responses does.
        self._connection.execute("CREATE UNIQUE INDEX by_user ON histories (user)")

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def of(self, user: str) -> list[str]:
        """Return a user's items, oldest first; those outside the catalogue are left out.

        Raises:
            UnknownError: There is no such user; names a similar one.
        """
        query = "SELECT items FROM histories WHERE user = ?"
        row = self._connection.execute(query, [user]).fetchone()
        if row is None:
            self._refuse_unknown(user)
        return [item for item in row[0] if item in self._catalogue.titles]

    def all(self) -> Iterator[tuple[str, list[str]]]:
        """Yield every user with the items that :meth:`of` returns, in the order of ids."""
        query = "SELECT user, items FROM histories ORDER BY user"
        cursor = self._connection.cursor().execute(query)
        while rows := cursor.fetchmany(1000):
            for user, items in rows:
                yield user, [item for item in items if item in self._catalogue.titles]

    def users(self) -> list[str]:
        """Return the ids of all users, sorted."""
        rows = self._connection.execute("SELECT user FROM histories").fetchall()
        return sorted(user for (user,) in rows)

    def _refuse_unknown(self, user: str) -> NoReturn:
        query = f"""FROM (
                (SELECT user FROM histories WHERE user < $user ORDER BY 1 DESC LIMIT {IDS_COMPARED})
                UNION ALL
                (SELECT user FROM histories WHERE user > $user ORDER BY 1 LIMIT {IDS_COMPARED})
            ) ORDER BY levenshtein(user, $user), user LIMIT 1"""
        row = self._connection.execute(query, {"user": user}).fetchone()
        closest = f"; the closest one is {row[0]!r}" if row else ""
        raise UnknownError(
            expected="a user of the run",
            got=repr(user),
            where="user",
            fix=f"for another user give the history instead{closest}",
        )
