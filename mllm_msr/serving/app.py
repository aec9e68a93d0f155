"""The application: endpoints over a :class:`~mllm_msr.serving.batching.Batcher`."""

import asyncio
import bisect
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import fastapi
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Match

import mllm_msr
from mllm_msr.core.errors import ParamsError, UnknownError
from mllm_msr.recommendation.recommender import Query, Recommendations
from mllm_msr.serving import messages
from mllm_msr.serving.batching import Answering, Batcher, NotReadyError, QueueFullError
from mllm_msr.serving.guards import HUNG_UP, Guard, Limits, Recorder, problem
from mllm_msr.serving.items import Items, ItemView
from mllm_msr.serving.observing import Metrics

PAGE = Path(__file__).parent / "page"
RETRY_SECONDS = 1  # what a client that is refused is told to wait
SECONDS_TO_STOP = 10  # for the queries in the queue, when the service stops
DEFAULT_K = 10  # items of a recommendation
MOST_LISTED = 100  # users or items of one listing
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": messages.Problem, "description": text}
    for status, text in {
        400: "A field or value is wrong.",
        401: "The API key is missing or wrong.",
        404: "There is no such user, item or image.",
        413: "The body is too large.",
        422: "A field is missing, or of another type.",
        429: "Too many requests wait; Retry-After says how long to wait.",
        503: "The model is still being loaded, or the service is stopping.",
        504: "There is no answer within the time limit.",
    }.items()
}

ItemId = Annotated[str, fastapi.Path(min_length=1, max_length=messages.LONGEST_ID)]
UserId = Annotated[str, fastapi.Query(min_length=1, max_length=messages.LONGEST_ID)]
K = Annotated[int, fastapi.Query(ge=1, le=messages.MOST_RANKED)]
Listed = Annotated[int, fastapi.Query(ge=1, le=MOST_LISTED)]
Words = Annotated[str, fastapi.Query(max_length=messages.LONGEST_ID)]
Load = Callable[[], AbstractContextManager[Answering]]


class HungUpError(Exception):
    """The client has gone."""


class Loaded(NamedTuple):
    """What is listed without the model.

    Attributes:
        items: The items.
        users: Ids of the users, sorted.
    """

    items: Items
    users: list[str]


class Service:
    """What the endpoints share: the batcher, and items and users once it has loaded them."""

    def __init__(
        self, load: Load, images: Path, *, longest_queue: int, on_failure: Callable[[], None]
    ) -> None:
        """Take what to serve.

        Args:
            load: Opens the recommender.
            images: The table Images.
            longest_queue: The most requests that may wait.
            on_failure: Is called when the recommender cannot be loaded.
        """
        self.metrics = Metrics()
        self.batcher = Batcher(
            load,
            longest_queue=longest_queue,
            on_loaded=self._open,
            on_failure=on_failure,
            on_batch=self.metrics.count_batch,
        )
        self.metrics.watch(self.batcher)
        self._images = images
        self._loaded: Loaded | None = None

    def _open(self, recommender: Answering) -> None:
        """Open items and users in the batcher's thread."""
        items = Items(recommender.catalogue, self._images)
        self._loaded = Loaded(items, recommender.users())

    @property
    def items(self) -> Items:
        """The items.

        Raises:
            NotReadyError: They are not loaded yet.
        """
        return self._require_loaded().items

    def _require_loaded(self) -> Loaded:
        if self._loaded is None:
            raise NotReadyError
        return self._loaded

    def users(self, prefix: str, limit: int) -> list[str]:
        """Return the first users whose ids begin with a prefix.

        Raises:
            NotReadyError: They are not loaded yet.
        """
        users = self._require_loaded().users
        rest = islice(users, bisect.bisect_left(users, prefix), None)
        return list(islice(takewhile(lambda user: user.startswith(prefix), rest), limit))

    async def check(self, items: Sequence[str], where: str) -> None:
        """Refuse unknown items, outside the batcher's thread: to find the closest id takes long."""
        await run_in_threadpool(self.items.catalogue.check, items, where)

    async def ask(self, request: Request, query: Query) -> Recommendations:
        """Answer a query; a client that goes takes it out of the queue.

        Raises:
            HungUpError: The client has gone.
            NotReadyError: The recommender is not loaded.
            QueueFullError: Too many queries wait.
            UserError: The query is wrong.
        """
        answer = asyncio.wrap_future(self.batcher.submit(query))
        gone = asyncio.ensure_future(_wait_until_gone(request))
        try:
            either: set[asyncio.Future[Any]] = {answer, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise HungUpError
            return answer.result()
        finally:
            gone.cancel()
            answer.cancel()


def create_app(service: Service, limits: Limits) -> FastAPI:
    """Return the application of a service, which it starts and stops."""

    @asynccontextmanager
    async def run_service(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await run_in_threadpool(service.batcher.close, SECONDS_TO_STOP)

    app = FastAPI(
        title="MLLM-MSR",
        description="Recommendations of a finished run.",
        version=mllm_msr.__version__,
        lifespan=run_service,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    _add_recommending(app, service)
    _add_catalogue(app, service)
    _add_operation(app, service)
    _add_page(app)
    _add_refusals(app)
    app.add_middleware(Guard, limits=limits)
    app.add_middleware(Recorder, metrics=service.metrics)  # the last one added is outermost
    return app


def _add_recommending(app: FastAPI, service: Service) -> None:
    @app.get("/recommend", responses=FAILURES)
    async def recommend_to_user(
        request: Request, user: UserId, k: K = DEFAULT_K, remove_seen: bool = True
    ) -> messages.Recommended:
        """Recommend items to a user of the run."""
        query = Query(user=user, k=k, keep_seen=not remove_seen)
        answer = await service.ask(request, query)
        return messages.Recommended.of(answer, service.items.has_image)

    @app.post("/recommend", responses=FAILURES)
    async def recommend(request: Request, body: messages.RecommendBody) -> messages.Recommended:
        """Recommend items for a history, or rank given candidates."""
        await service.check(body.history or [], "history")
        await service.check(body.candidates or [], "candidates")
        query = Query(
            user=body.user,
            history=body.history,
            candidates=body.candidates,
            k=body.k or len(body.candidates or range(DEFAULT_K)),
            keep_seen=not body.remove_seen,
        )
        answer = await service.ask(request, query)
        return messages.Recommended.of(answer, service.items.has_image)

    @app.post("/rerank", responses=FAILURES)
    async def rerank(request: Request, body: messages.RerankBody) -> messages.Reranked:
        """Rank documents, items by id or title, for a preference text or a history."""
        named = [each if isinstance(each, str) else each.text for each in body.documents]
        items = await run_in_threadpool(service.items.resolve, named)
        query = Query(candidates=items, k=len(items))
        if isinstance(body.query, str):
            query = query._replace(preference=body.query)
        else:
            await service.check(body.query, "query")
            query = query._replace(history=body.query)
        answer = await service.ask(request, query)
        ranked = {each.item: each for each in answer.items}
        order = sorted(range(len(items)), key=lambda index: ranked[items[index]].rank)
        results = [
            messages.Result(index=index, relevance_score=ranked[items[index]].p_yes or 0.0)
            for index in order
        ]
        return messages.Reranked(results=results[: body.top_n])

    @app.post("/preference", responses=FAILURES)
    async def preference(request: Request, body: messages.PreferenceBody) -> messages.Preferences:
        """Infer the preference text after each block of a history."""
        await service.check(body.history, "history")
        answer = await service.ask(request, Query(history=body.history, candidates=()))
        return messages.Preferences(preferences=list(answer.preferences))


def _add_catalogue(app: FastAPI, service: Service) -> None:
    @app.get("/items", responses=FAILURES)
    async def search_items(search: Words = "", limit: Listed = 24) -> messages.ItemList:
        """List items whose id or title has all words, the most popular first."""
        found = await run_in_threadpool(service.items.search, search, limit)
        return messages.ItemList(items=[_describe(each) for each in found])

    @app.get(  # before the path of an item, whose id may have slashes
        "/items/{item:path}/image",
        response_class=Response,
        responses=FAILURES | {200: {"content": {"image/png": {}}}},
    )
    async def show_image(item: ItemId) -> Response:
        """Show an item's image."""
        image = await run_in_threadpool(service.items.image, item)
        return Response(image, media_type="image/png")

    @app.get("/items/{item:path}", responses=FAILURES)
    async def show_item(item: ItemId) -> messages.Item:
        """Show an item."""
        return _describe(await run_in_threadpool(service.items.find, item))

    @app.get("/users", responses=FAILURES)
    async def list_users(prefix: Words = "", limit: Listed = 24) -> messages.UserList:
        """List users whose ids begin with a prefix."""
        return messages.UserList(users=service.users(prefix, limit))


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.get("/health/live")
    async def show_live() -> messages.State:
        """Say that the process answers."""
        return messages.State(status="live")

    @app.get("/health/ready", responses={503: FAILURES[503]})
    async def show_ready() -> messages.State:
        """Say whether the model is loaded."""
        if not service.batcher.is_ready:
            raise NotReadyError
        return messages.State(status="ready")

    @app.get("/metrics", response_class=Response, responses={401: FAILURES[401]})
    async def show_metrics() -> Response:
        """Show metrics for Prometheus."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.render(), headers={"Content-Type": kind})


def _add_page(app: FastAPI) -> None:
    for path, file in {"/": "index.html", "/docs": "docs.html"}.items():
        show = partial(FileResponse, PAGE / file)
        app.add_api_route(path, _returns(show), include_in_schema=False, response_class=Response)
    app.mount("/page", StaticFiles(directory=PAGE))


def _returns(make: Callable[[], Response]) -> Callable[[], Response]:
    """Return a function without parameters, which FastAPI would read from the request."""

    def answer() -> Response:
        return make()

    return answer


def _add_refusals(app: FastAPI) -> None:
    # No request can correct another UserError: it is answered as any failure of the service.
    @app.exception_handler(UnknownError)
    async def refuse_unknown(_: Request, error: UnknownError) -> JSONResponse:
        return problem(404, str(error))

    @app.exception_handler(ParamsError)
    async def refuse_wrong(_: Request, error: ParamsError) -> JSONResponse:
        return problem(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = error.errors()
        # Of a value that may be of two types, what is wrong with it as the type that it has.
        first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
        where = ".".join(str(part)[: messages.LONGEST_ID] for part in first["loc"])
        return problem(422, " ".join(f"{where}: {first['msg']}; correct the request".split()))

    @app.exception_handler(HTTPException)
    async def refuse_other(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette names the methods of one endpoint of a path
            headers["Allow"] = ", ".join(sorted(_find_methods(app, request)))
        return problem(error.status_code, f"{error.detail}; see /docs", **headers)

    @app.exception_handler(QueueFullError)
    async def refuse_full(_: Request, __: QueueFullError) -> JSONResponse:
        wait = {"Retry-After": str(RETRY_SECONDS)}
        return problem(429, "too many requests wait; ask again later", **wait)

    @app.exception_handler(NotReadyError)
    async def refuse_unready(_: Request, __: NotReadyError) -> JSONResponse:
        wait = {"Retry-After": str(RETRY_SECONDS)}
        return problem(503, "the model is not loaded; ask again later", **wait)

    @app.exception_handler(HungUpError)
    async def note_hung_up(_: Request, __: HungUpError) -> Response:
        return Response(status_code=HUNG_UP)  # for the log; nobody reads it


def _find_methods(app: FastAPI, request: Request) -> set[str]:
    """Return the methods of all endpoints of the path that was asked for."""
    return {
        method
        for route in app.routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    }


def _describe(view: ItemView) -> messages.Item:
    return messages.Item(**view._asdict())


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
