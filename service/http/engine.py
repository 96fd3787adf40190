"""The model, its indexes, and the queries under way."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from starlette.concurrency import run_in_threadpool

from estimators.names import THROUGH_RUN
from index.current import current_folder
from index.manifest import FILE_NAME as MANIFEST
from index.manifest import Manifest
from service.checkpoints import ModelSource
from service.errors import (
    ClientGone,
    DeadlinePassed,
    NotReady,
    Overloaded,
    ShuttingDown,
    UnknownEstimator,
    UnknownIndex,
)
from service.http.telemetry import Refusal, Telemetry
from service.models import BadQuery, LoadedModel, load_model
from service.schemas.answers import (
    CandidatesEvent,
    GradientEvent,
    MeasurementSchema,
    ProgressEvent,
    QueryResponse,
    ResultSchema,
)
from service.schemas.queries import QueryRequest, Schema
from service.search.answer import Answer
from service.search.batching import Batcher, Ticket
from service.search.opening import open_index
from service.search.retrieval import Retriever
from service.search.run import Run
from service.settings import Settings
from service.tracing.asking import trace_more
from service.tracing.walk import Question

POLL_SECONDS = 0.1
"""So often it is looked whether a client has hung up."""

REFUSALS: dict[type[Exception], Refusal] = {
    Overloaded: "overloaded",
    DeadlinePassed: "deadline",
    ShuttingDown: "shutting down",
    NotReady: "not ready",
    ClientGone: "client gone",
}

log = logging.getLogger(__name__)

Stamp = tuple[str, int, int]


class Engine:
    """The model, its indexes, and the gate that queries pass.

    Up to ``max_in_flight`` queries wait or are under way; more are refused at once. Those of
    background jobs give way to them and are not counted.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self.settings = settings
        self.telemetry = telemetry
        self.retrievers: dict[str, Retriever] = {}
        self.in_flight = 0
        self.batcher = Batcher(settings.max_together)
        self._loaded: LoadedModel | None = None
        self._stamps: dict[str, Stamp] = {}
        telemetry.watch_queries(lambda: self.in_flight, lambda: self.batcher.waiting)

    def load(self) -> None:
        """Load the model and every index.

        Raises:
            ValueError: one of them is missing, damaged or does not fit.
        """
        settings = self.settings
        self._loaded = load_model(
            self._source(),
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        for note in self._loaded.notes:
            log.info(note)
        retrievers = {}
        for name, root in settings.indexes.items():
            self._stamps[name] = _stamp(root)
            retrievers[name] = self._open(name)
        self.retrievers = retrievers

    def _source(self) -> ModelSource:
        """The model of the settings; the first index says what they leave out."""
        settings = self.settings
        source = ModelSource.of(
            settings.model,
            settings.revision,
            tokenizer=settings.tokenizer,
            base_model=settings.base_model,
            unused_weights=settings.unused_weights,
        )
        first = next(iter(settings.indexes.values()))
        return source.completed(Manifest.read(current_folder(first)).model)

    def _open(self, name: str) -> Retriever:
        assert self._loaded is not None
        settings = self.settings
        index = open_index(
            current_folder(settings.indexes[name]),
            self._loaded,
            settings.search_device,
            trace=settings.traces.get(name),
            run=settings.runs.get(name),
        )
        return Retriever(index, settings.token_budget)

    def reload(self) -> list[str]:
        """Open indexes that were changed or replaced, and serve them from now on.

        Queries under way stay with the index that they began with. One that cannot be opened is
        told in the log, and the one that is served stays.

        Returns:
            The names of those that were opened.
        """
        opened: list[str] = []
        if not self.retrievers:  # still loading
            return opened
        for name, root in self.settings.indexes.items():
            try:
                stamp = _stamp(root)
                if stamp == self._stamps.get(name):
                    continue
                self._stamps[name] = stamp
                retriever = self._open(name)
            except (ValueError, OSError, RuntimeError) as error:
                log.error("index '%s' was changed but cannot be opened: %s", name, error)
                continue
            self.retrievers = {**self.retrievers, name: retriever}
            opened.append(name)
        return opened

    async def watch_indexes(self) -> None:
        """Look for changed indexes for ever."""
        while True:
            await asyncio.sleep(self.settings.reload_seconds)
            for name in await run_in_threadpool(self.reload):
                log.info("index '%s' was opened anew", name)

    def close(self, seconds: float = 0.0) -> None:
        """Refuse what waits and let what is under way answer within ``seconds``."""
        self.batcher.close(seconds)

    def retriever(self, name: str) -> Retriever:
        """The retriever of the index ``name``.

        Raises:
            NotReady: nothing is loaded yet.
            UnknownIndex: there is none of this name.
        """
        if not self.retrievers:
            raise NotReady("The model and its indexes are still being loaded; try again shortly.")
        if name not in self.retrievers:
            raise UnknownIndex(
                f"There is no index '{name}'; this service has {', '.join(self.retrievers)}."
            )
        return self.retrievers[name]

    async def answer(
        self,
        request: QueryRequest,
        *,
        client_gone: Callable[[], Awaitable[bool]] | None = None,
        background: bool = False,
    ) -> QueryResponse:
        """Answer a query, or refuse it at once when too many are under way.

        Args:
            request: the query.
            client_gone: whether its client has hung up, asked now and then; its query is dropped.
            background: wait for spare capacity, however long, and give way to others.
        """
        with self._counted():
            ticket = self._submit(request, background=background)
            try:
                answer = await _wait(ticket.outcome, client_gone)
            finally:
                self._leave(ticket)
        response = QueryResponse.from_answer(answer, request)
        self.telemetry.observe_answer(response)
        return response

    async def trace(self, requests: Sequence[QueryRequest]) -> None:
        """Trace what is asked of the run itself, where that was not done before.

        Questions of one index are traced together. What cannot be measured is left out.

        Raises:
            RunFault: there is no run to trace through, or it cannot be traced.
        """
        asked: dict[tuple[str, str], list[Question]] = {}
        for request in requests:
            with suppress(BadQuery, UnknownEstimator, UnknownIndex):
                if request.estimator in THROUGH_RUN:
                    retriever = self.check(request)
                    found = await run_in_threadpool(
                        retriever.measures, request.to_query(self.settings.max_budget)
                    )
                    asked.setdefault((request.index, request.estimator), []).append(found)
        for (name, estimator), questions in asked.items():
            trace = self.retriever(name).index.trace
            if trace is not None:
                await trace_more(trace, questions, estimator)

    def stream(self, request: QueryRequest) -> AsyncIterator[tuple[str, Schema]]:
        """Answer a query with news on the way: event names and their data, the answer last.

        Refusals that are known at once are raised here, others from the iterator.
        """
        news: asyncio.Queue[tuple[str, Schema] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        start = time.monotonic()

        def tell(item: tuple[str, Schema] | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(news.put_nowait, item)

        def watch(name: str, run: Run) -> None:
            tell((name, _event(name, run, time.monotonic() - start)))

        with self._counted():
            ticket = self._submit(request, watch=watch)
        ticket.outcome.add_done_callback(lambda _: tell(None))
        return self._news(ticket, news, request)

    async def _news(
        self,
        ticket: Ticket,
        news: "asyncio.Queue[tuple[str, Schema] | None]",
        request: QueryRequest,
    ) -> AsyncIterator[tuple[str, Schema]]:
        try:
            while (item := await news.get()) is not None:
                yield item
            with self._counted():
                answer = ticket.outcome.result()
            response = QueryResponse.from_answer(answer, request)
            self.telemetry.observe_answer(response)
            yield "result", response
        finally:
            self._leave(ticket)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count what was not computed, by its reason."""
        try:
            yield
        except tuple(REFUSALS) as error:
            self.telemetry.refused(REFUSALS[type(error)])
            raise

    def _submit(
        self,
        request: QueryRequest,
        *,
        background: bool = False,
        watch: Callable[[str, Run], None] | None = None,
    ) -> Ticket:
        retriever = self.check(request)
        if self.in_flight >= self.settings.max_in_flight and not background:
            raise Overloaded(
                f"{self.in_flight} queries are under way, as many as this service accepts; "
                f"try again in a moment."
            )
        ticket = Ticket(
            retriever=retriever,
            query=request.to_query(self.settings.max_budget),
            background=background,
            watch=watch,
        )
        if request.deadline is not None:
            ticket.deadline = time.monotonic() + request.deadline
        self.batcher.submit(ticket)
        self.in_flight += not background
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        ticket.outcome.cancel()  # nothing, if it is answered
        self.in_flight -= not ticket.background

    def check(self, request: QueryRequest) -> Retriever:
        """What a request would be refused for at once; the retriever that it asks.

        Raises:
            NotReady, UnknownIndex, UnknownEstimator, BadQuery: it is refused.
        """
        retriever = self.retriever(request.index)
        self._check_limits(request)
        retriever.index.estimators.choose(request.estimator, request.parameters)
        return retriever

    def _check_limits(self, request: QueryRequest) -> None:
        settings = self.settings
        texts = "prompt, messages, completion or against"
        limits = (
            (texts, request.longest_text, settings.max_prompt_characters, "characters"),
            ("batch", len(request.batch or ()), settings.max_batch, "queries"),
            ("batch times samples", request.most_terms, settings.max_batch, "completions"),
            ("k", request.k, settings.max_k, ""),
            ("budget", _number(request.budget), settings.max_budget, "rows"),
            ("calibration_rows", request.calibration_rows, settings.max_sampled_rows, "rows"),
            ("audit_rows", request.audit_rows, settings.max_sampled_rows, "rows"),
        )
        for name, value, limit, unit in limits:
            if value > limit:
                raise BadQuery(
                    f"{name} is {value:,} {unit}".rstrip()
                    + f"; this service accepts at most {limit:,}."
                )


def _number(budget: int | Literal["auto"]) -> int:
    return 0 if budget == "auto" else budget


def _stamp(root: Path) -> Stamp:
    """What changes when an index is replaced, appended to or shortened."""
    manifest = current_folder(root) / MANIFEST
    if not manifest.is_file():
        return str(manifest), 0, 0
    status = manifest.stat()
    return str(manifest), status.st_mtime_ns, status.st_ino


async def _wait(
    outcome: Future[Answer], client_gone: Callable[[], Awaitable[bool]] | None
) -> Answer:
    future = asyncio.wrap_future(outcome)
    while True:
        done, _ = await asyncio.wait(
            {future}, timeout=None if client_gone is None else POLL_SECONDS
        )
        if done:
            return future.result()
        if client_gone is not None and await client_gone():
            raise ClientGone("The client hung up before its query was answered.")


def _event(name: str, run: Run, seconds: float) -> Schema:
    if name == "gradient":
        return GradientEvent(measurement=MeasurementSchema.from_terms(run.terms))
    if name == "candidates":
        return CandidatesEvent(rows=len(run.rows), seconds=seconds)
    side = list(run.searches)[-1]
    search = run.searches[side]
    certificate = search.sketch_certificate()
    return ProgressEvent(
        direction=side,
        rescored_rows=search.rescored,
        sampled_rows=search.sampled,
        recall_lower_bound=certificate.recall_lower_bound,
        rows_to_certify=certificate.open_rows,
        results=[ResultSchema.from_result(result) for result in run.best(side)],
        seconds=seconds,
    )
