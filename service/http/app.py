"""The HTTP API: ``create_app(settings)``."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool

from service.http import access, limits, problems
from service.http.engine import Engine
from service.http.job_routes import add_job_routes
from service.http.job_routes import describe as describe_problem
from service.http.openapi import describe
from service.http.pages import install_page
from service.http.suggestions import suggest
from service.http.telemetry import Telemetry
from service.jobs.runner import JobRunner
from service.jobs.store import JobStore
from service.schemas.answers import QueryResponse
from service.schemas.indexes import (
    EstimatorSchema,
    EstimatorsResponse,
    ExampleResponse,
    HealthResponse,
    IndexesResponse,
    IndexResponse,
    OfferSchema,
    ParameterSchema,
    SketchSchema,
    SuggestionsResponse,
    TraceSchema,
)
from service.schemas.queries import QueryRequest, Schema
from service.scoring.estimators import Offer
from service.search.retrieval import Retriever
from service.settings import Settings
from service.tracing.served import ServedTrace

KEEPALIVE_SECONDS = 10.0
"""After so long without an event a stream sends a comment, so that nobody thinks it dead."""


def create_app(settings: Settings, *, load: bool = True) -> FastAPI:
    """The service.

    Args:
        settings: of the service.
        load: load model and indexes when it starts up, unless they already are; otherwise whoever
            serves it calls ``app.state.engine.load()``.

    Raises:
        ValueError: the keys are unfit, or the file of jobs cannot be used.
    """
    telemetry = Telemetry(settings)
    engine = Engine(settings, telemetry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if load and not engine.retrievers:
            await run_in_threadpool(engine.load)
        tasks = [asyncio.create_task(engine.watch_indexes())]
        if jobs is not None:
            tasks.append(asyncio.create_task(jobs.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            engine.close()
            if jobs is not None:
                jobs.store.close()

    app = FastAPI(
        title="Etymon",
        summary="Which training examples made a language model say something, and how sure it is "
        "that none was missed.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.engine = engine
    problems.install(app)
    _add_query_routes(app)
    add_job_routes(app)
    _add_reading_routes(app)
    telemetry.add_metrics_route(app)
    install_page(app)
    describe(app)
    limits.install(app, settings)
    access.install(app, settings)
    telemetry.install(app)
    # Here, so that a file that cannot be used is told by whoever serves, in a sentence.
    jobs = None
    if settings.jobs_path is not None:
        store = JobStore(settings.jobs_path, settings.max_jobs)
        jobs = JobRunner(
            store, engine, settings.jobs_together, telemetry.set_jobs, describe_problem
        )
    app.state.jobs = jobs
    return app


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


TheEngine = Annotated[Engine, Depends(_engine)]
IndexName = Annotated[str, Query(description="Name of the index.")]


def _add_query_routes(app: FastAPI) -> None:
    @app.post("/v1/query", responses=problems.described(*ASKING))
    async def query(body: QueryRequest, request: Request, engine: TheEngine) -> QueryResponse:
        """Find the training examples that most raised log p(completion | prompt)."""
        return await engine.answer(body, client_gone=request.is_disconnected)

    @app.post(
        "/v1/query/stream",
        response_class=StreamingResponse,
        responses={
            200: {"description": STREAM, "content": {"text/event-stream": {}}},
            **problems.described(*ASKING),
        },
    )
    async def stream(body: QueryRequest, request: Request, engine: TheEngine) -> StreamingResponse:
        """The same with news on the way, as server-sent events."""
        news = engine.stream(body)
        return StreamingResponse(
            _as_events(news, request.url.path),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


ASKING = (404, 422, 429, 503)
STREAM = (
    "Events: gradient (GradientEvent), candidates (CandidatesEvent), progress (ProgressEvent, "
    "again and again), then either result (QueryResponse) or error (a problem document)."
)


async def _as_events(news: AsyncIterator[tuple[str, Schema]], path: str) -> AsyncIterator[bytes]:
    following = asyncio.ensure_future(anext(news, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=KEEPALIVE_SECONDS)
            if not done:
                yield KEEPALIVE_COMMENT
                continue
            item = following.result()
            if item is None:
                return
            name, data = item
            yield format_sse_event(event=name, data_str=data.model_dump_json())
            following = asyncio.ensure_future(anext(news, None))
    except Exception as error:  # noqa: BLE001 - the status is sent; the document comes as an event
        yield format_sse_event(
            event="error", data_str=json.dumps(problems.problem_document(path, error))
        )
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await following
        await news.aclose()  # type: ignore[attr-defined]


def _add_reading_routes(app: FastAPI) -> None:
    @app.get("/v1/index", responses=problems.described(503))
    async def indexes(engine: TheEngine) -> IndexesResponse:
        """What is served: models, estimators, attributed share, skipped modules, corpora."""
        _check_ready(engine)
        return IndexesResponse(
            indexes=[_describe(name, r) for name, r in engine.retrievers.items()]
        )

    @app.get("/v1/estimators", responses=problems.described(503))
    async def estimators(engine: TheEngine) -> EstimatorsResponse:
        """Ways of scoring examples, which of them each index answers for, and their parameters."""
        _check_ready(engine)
        return await run_in_threadpool(_list_estimators, engine.retrievers)

    @app.get("/v1/examples/{example_id:path}", responses=problems.described(404, 422, 503))
    async def example(
        example_id: str,
        engine: TheEngine,
        index: IndexName = "default",
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

    @app.get("/v1/suggestions", responses=problems.described(404, 422, 503))
    async def suggestions(engine: TheEngine, index: IndexName = "default") -> SuggestionsResponse:
        """Three questions to begin with: beginnings of the index' own examples, always the same."""
        examples = engine.retriever(index).index.examples
        return SuggestionsResponse(suggestions=await run_in_threadpool(suggest, examples))

    @app.get("/livez")
    async def live() -> HealthResponse:
        """The process answers."""
        return HealthResponse(status="ok")

    @app.get("/readyz", responses=problems.described(503))
    async def ready(engine: TheEngine) -> HealthResponse:
        """Model and indexes are loaded."""
        _check_ready(engine)
        return HealthResponse(status="ok")


def _list_estimators(retrievers: Mapping[str, Retriever]) -> EstimatorsResponse:
    offers: dict[str, list[tuple[str, Offer]]] = {}
    for name, retriever in retrievers.items():
        for offer in retriever.index.estimators.offers():
            offers.setdefault(offer.name, []).append((name, offer))
    return EstimatorsResponse(
        estimators=[
            EstimatorSchema(
                name=name,
                summary=found[0][1].summary,
                by_gradients=found[0][1].by_gradients,
                influences=found[0][1].influences,
                indexes=[
                    OfferSchema(
                        index=index,
                        own=retrievers[index].index.manifest.estimator.name == name,
                        parameters={
                            key: ParameterSchema(**vars(parameter))
                            for key, parameter in offer.parameters.items()
                        },
                        unavailable=offer.unavailable,
                    )
                    for index, offer in found
                ],
            )
            for name, found in offers.items()
        ]
    )


def _check_ready(engine: Engine) -> None:
    engine.retriever(next(iter(engine.settings.indexes)))


def _describe(name: str, retriever: Retriever) -> IndexResponse:
    manifest = retriever.index.manifest
    shared = {f: getattr(manifest, f) for f in IndexResponse.model_fields if hasattr(manifest, f)}
    sketch = manifest.sketch.model_dump(exclude={"seed", "later"})
    shared["sketch"] = SketchSchema(**sketch, slices=manifest.sketch.slices)
    shared["corpora"] = [part.data for part in manifest.parts]
    shared["rows"] = len(retriever.index.examples)
    shared["deleted_rows"] = manifest.rows - shared["rows"]
    shared["trace"] = _describe_trace(retriever.index.trace)
    shared["chat_template"] = bool(getattr(retriever.loaded.tokenizer, "chat_template", None))
    return IndexResponse(name=name, failed_rows=manifest.failed, **shared)


def _describe_trace(trace: ServedTrace | None) -> TraceSchema | None:
    if trace is None:
        return None
    return TraceSchema(
        questions=trace.questions,
        run_rows=len(trace.matching.lacking),
        lacking_rows=int(trace.matching.lacking.sum()),
        unread_rows=trace.matching.unread,
        notes=list(trace.told()),
    )
