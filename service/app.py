"""The HTTP API: ``create_app(settings)``."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from starlette.concurrency import run_in_threadpool

from service import errors
from service.errors import ClientGone, NotReady, Overloaded, UnknownIndex
from service.models import BadQuery, load_model
from service.opening import open_index
from service.retrieval import Retriever
from service.schemas import (
    ExampleResponse,
    HealthResponse,
    IndexesResponse,
    IndexResponse,
    ProblemResponse,
    QueryRequest,
    QueryResponse,
    SketchSchema,
)
from service.settings import Settings

PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemResponse, "description": text}
    for status, text in (
        (404, "No such index or example."),
        (422, "The request is invalid or cannot be measured."),
        (503, "Overloaded, not ready, or the index cannot be used."),
    )
}


class Engine:
    """The model, its indexes, and the gate that queries pass.

    One query computes at a time: it uses all cores, and captures gradients through hooks on the
    one model. Up to ``max_in_flight`` wait or compute; more are refused at once.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.retrievers: dict[str, Retriever] = {}
        self._in_flight = 0
        self._turn = asyncio.Lock()

    def load(self) -> None:
        """Load the model and every index.

        Raises:
            ValueError: one of them is missing, damaged or does not fit.
        """
        settings = self.settings
        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        self.retrievers = {
            name: Retriever(
                open_index(folder, loaded, settings.search_device), settings.token_budget
            )
            for name, folder in settings.indexes.items()
        }

    def retriever(self, name: str) -> Retriever:
        """The retriever of the index ``name``."""
        if not self.retrievers:
            raise NotReady("The model and its indexes are still being loaded; try again shortly.")
        if name not in self.retrievers:
            raise UnknownIndex(
                f"There is no index '{name}'; this service has {', '.join(self.retrievers)}."
            )
        return self.retrievers[name]

    async def answer(
        self, request: QueryRequest, is_gone: Callable[[], Awaitable[bool]]
    ) -> QueryResponse:
        """Answer a query, or refuse it at once when too many are under way.

        Args:
            request: the query.
            is_gone: whether its client has hung up, asked when its turn comes.
        """
        retriever = self.retriever(request.index)
        self._check_limits(request)
        if self._in_flight >= self.settings.max_in_flight:
            raise Overloaded(
                f"{self._in_flight} queries are under way, as many as this service accepts; "
                f"try again in a moment."
            )
        self._in_flight += 1
        try:
            async with self._turn:
                if await is_gone():
                    raise ClientGone("The client hung up before its query's turn came.")
                answer = await run_in_threadpool(retriever.answer, request.to_query())
        finally:
            self._in_flight -= 1
        return QueryResponse.from_answer(answer, request)

    def _check_limits(self, request: QueryRequest) -> None:
        settings = self.settings
        longest = max(len(request.prompt), len(request.completion or ""))
        limits = (
            ("prompt or completion", longest, settings.max_prompt_characters, "characters"),
            ("k", request.k, settings.max_k, ""),
            ("budget", request.budget, settings.max_budget, "rows"),
            ("calibration_rows", request.calibration_rows, settings.max_sampled_rows, "rows"),
            ("audit_rows", request.audit_rows, settings.max_sampled_rows, "rows"),
        )
        for name, value, limit, unit in limits:
            if value > limit:
                raise BadQuery(
                    f"{name} is {value:,} {unit}".rstrip()
                    + f"; this service accepts at most {limit:,}."
                )


def create_app(settings: Settings) -> FastAPI:
    """The service; model and indexes are loaded when it starts up, unless they already are."""
    engine = Engine(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not engine.retrievers:
            await run_in_threadpool(engine.load)
        yield

    app = FastAPI(
        title="Etymon",
        summary="Which training examples made a language model say something, and how sure it is "
        "that none was missed.",
        version="1",
        lifespan=lifespan,
    )
    app.state.engine = engine
    errors.install(app)
    _add_routes(app)
    return app


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _add_routes(app: FastAPI) -> None:
    @app.post("/v1/query", responses=PROBLEM_RESPONSES)
    async def query(
        body: QueryRequest, request: Request, engine: Annotated[Engine, Depends(_engine)]
    ) -> QueryResponse:
        """Find the training examples that most raised log p(completion | prompt)."""
        return await engine.answer(body, request.is_disconnected)

    @app.get("/v1/index", responses=PROBLEM_RESPONSES)
    async def indexes(engine: Annotated[Engine, Depends(_engine)]) -> IndexesResponse:
        """What is served: models, estimators, attributed share, skipped modules, corpora."""
        engine.retriever(next(iter(engine.settings.indexes)))
        return IndexesResponse(
            indexes=[_describe(name, r) for name, r in engine.retrievers.items()]
        )

    @app.get("/v1/examples/{example_id:path}", responses=PROBLEM_RESPONSES)
    async def example(
        example_id: str,
        engine: Annotated[Engine, Depends(_engine)],
        index: Annotated[str, Query(description="Name of the index.")] = "default",
    ) -> ExampleResponse:
        """One training example by its id."""
        examples = engine.retriever(index).index.examples
        row = examples.row_of(example_id)
        found = examples[row]
        return ExampleResponse(
            id=found.id,
            row=row,
            document=found.document,
            text=found.text,
            tokens=len(found.tokens),
            metadata=found.metadata,
        )

    @app.get("/livez")
    async def live() -> HealthResponse:
        """The process answers."""
        return HealthResponse(status="ok")

    @app.get("/readyz", responses={503: PROBLEM_RESPONSES[503]})
    async def ready(engine: Annotated[Engine, Depends(_engine)]) -> HealthResponse:
        """Model and indexes are loaded."""
        engine.retriever(next(iter(engine.settings.indexes)))
        return HealthResponse(status="ok")


def _describe(name: str, retriever: Retriever) -> IndexResponse:
    manifest = retriever.index.manifest
    shared = {f: getattr(manifest, f) for f in IndexResponse.model_fields if hasattr(manifest, f)}
    shared["sketch"] = SketchSchema(**manifest.sketch.model_dump(exclude={"seed"}))
    shared["corpora"] = [part.data for part in manifest.parts]
    shared["rows"] = len(retriever.index.examples)
    shared["deleted_rows"] = manifest.rows - shared["rows"]
    return IndexResponse(name=name, failed_rows=manifest.failed, **shared)
