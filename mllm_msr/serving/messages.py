"""Bodies of requests and answers; FastAPI makes the OpenAPI description of them."""

from collections.abc import Callable
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from mllm_msr.recommendation.recommender import Recommendations

LONGEST_ID = 256  # characters
LONGEST_TEXT = 4_000  # characters of a preference, and of a title
LONGEST_HISTORY = 1_000  # items; the last filter_sequences.max_history are read
MOST_RANKED = 500  # items that one request ranks

Id = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
History = Annotated[list[Id], Field(max_length=LONGEST_HISTORY)]
SomeHistory = Annotated[History, Field(min_length=1)]
Number = Annotated[int, Field(ge=1, le=MOST_RANKED)]


class Body(BaseModel):
    """A body whose fields are all known, so that a misspelt one is not silently left out."""

    model_config = ConfigDict(extra="forbid")


class RecommendBody(Body):
    """What to recommend for; a user, a history, or both, then the history counts."""

    user: Id | None = Field(None, description="A user of the run.")
    history: History | None = Field(None, description="Items, oldest first.")
    candidates: Annotated[list[Id], Field(min_length=1, max_length=MOST_RANKED)] | None = Field(
        None, description="Items to rank, in place of those that the retriever proposes."
    )
    k: Number | None = Field(
        None, description="How many items; by default 10, or all candidates where there are some."
    )
    remove_seen: bool = Field(
        True, description="Leave items of the history out; candidates are all ranked."
    )


class PreferenceBody(Body):
    """A history to infer the preference of."""

    history: SomeHistory = Field(description="Items, oldest first.")


class Document(BaseModel):
    """A document as an object."""

    text: Text


class RerankBody(BaseModel):
    """Documents to rank, as other rerankers take them; further fields are ignored."""

    query: Text | SomeHistory = Field(
        description="A preference text, or a list of items, the history, oldest first."
    )
    documents: Annotated[list[Text | Document], Field(min_length=1, max_length=MOST_RANKED)] = (
        Field(description="Items, by id or by a title that one item has.")
    )
    top_n: Number | None = Field(None, description="How many results; all by default.")


class HistoryEntry(BaseModel):
    """An item of a history."""

    item: str
    title: str | None
    image: bool = Field(description="Whether /items/{id}/image has one.")


class RankedItem(BaseModel):
    """A ranked item, with the fields of ``mllm-msr recommend``."""

    rank: int
    item: str
    title: str | None
    p_yes: float | None
    log_odds: float | None
    retriever: str | None
    retriever_rank: int | None
    image: bool = Field(description="Whether /items/{id}/image has one.")


class Recommended(BaseModel):
    """The answer to a request for recommendations."""

    user: str | None
    history: list[HistoryEntry]
    preferences: list[str] = Field(description="The text after each block; the last one counts.")
    items: list[RankedItem]

    @classmethod
    def of(cls, answer: Recommendations, has_image: Callable[[str], bool]) -> Self:
        """Return the answer of a recommender as a message.

        Args:
            answer: The answer.
            has_image: Whether an item has an image.
        """
        return cls(
            user=answer.user,
            history=[
                HistoryEntry(**each._asdict(), image=has_image(each.item))
                for each in answer.history
            ],
            preferences=list(answer.preferences),
            items=[
                RankedItem(**each._asdict(), image=has_image(each.item)) for each in answer.items
            ],
        )


class Preferences(BaseModel):
    """The preference text after each block."""

    preferences: list[str]


class Result(BaseModel):
    """A ranked document."""

    index: int = Field(description="In the documents of the request.")
    relevance_score: float = Field(description="p(yes).")


class Reranked(BaseModel):
    """Documents by relevance, the best first."""

    results: list[Result]


class Item(BaseModel):
    """An item of the catalogue."""

    item: str
    title: str | None
    summary: str | None
    interactions: int
    image: bool = Field(description="Whether /items/{id}/image has one.")


class ItemList(BaseModel):
    """Items of the catalogue."""

    items: list[Item]


class UserList(BaseModel):
    """Ids of users, sorted."""

    users: list[str]


class State(BaseModel):
    """The state of the service."""

    status: str


class Problem(BaseModel):
    """Why a request was refused, on one line."""

    error: str
