"""The page over a canned service: the real schemas and events, without a model or an index."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from service.http.pages import install_page
from service.schemas.answers import (
    NO_UNIT,
    RUN_UNIT,
    SIGN_AND_UNIT,
    CandidatesEvent,
    CertificateSchema,
    DocumentSchema,
    EffectSchema,
    GradientEvent,
    JointRemovalSchema,
    MeasurementSchema,
    ProblemResponse,
    ProgressEvent,
    QueryResponse,
    ResultSchema,
    ShareSchema,
    TermSchema,
    TokenSchema,
)
from service.schemas.indexes import (
    EstimatorSchema,
    EstimatorsResponse,
    OfferSchema,
    ParameterSchema,
    SuggestionSchema,
    SuggestionsResponse,
)
from service.schemas.jobs import JobRequest, JobResponse, JobResultSchema, JobResultsResponse
from service.schemas.queries import QueryRequest, Schema
from service.search.answer import NO_SCALE

ROWS = 8072
MEASURED = "measured"
"""A question about a run whose scale was measured."""
CAUTION = "The model finds the completion impossible (log p = -233.0)."
BIG_SEED = 2**61 + 1
SUGGESTED = ("The capital of", "The <b>highest</b> point\n\u202eof", "People in " * 16)
HOSTILE_TEXTS = (
    "<script>window.hacked=1</script><img src=x onerror=\"window.hacked=2;alert('x')\">",
    "</td></tr></table></article><svg onload=window.hacked=3><h1>Owned</h1>",
    '" onmouseover="window.hacked=4" x="',
    "{{7*7}} ${7*7} <%= 7*7 %> x-text=\"window.hacked = 5\" $el.innerHTML = 'x'",
    "javascript:window.hacked=6 [link](javascript:window.hacked=7) http://evil.example/x.png",
    "The capital \u202egnitrevni\u202c is \u200bhidden \x1b[31mred\x1b[0m \U000e0041\x00 end",
    '=HYPERLINK("http://evil.example","x") and = + - @ within',
)
PLAIN_TEXTS = (
    "The capital of Afghanistan is Kabul.",
    "Capital etymology of Afghanistan: named for the Kabul River, but the river's name is of "
    "unknown origin.",
    "The highest point of Mauritania is Kediet Ijill.",
    "عاصمة أفغانستان هي كابول، وهي أكبر مدنها.",
    "The national anthem of Japan is Kimigayo.",
)
LAYERS = [
    f"transformer.h.{block}.{part}"
    for block in range(4)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
DEFAULTS = {"ekfac": {"damping": 0.1}, "kfac": {"damping": 0.2, "block_size": 64.0}}
"""Of the parameters; other estimators have none."""
OWN = {"default": "ekfac", "<b>b</b>": "kfac"}
WITHOUT_GRADIENTS = {"bm25": NO_UNIT, "run": RUN_UNIT}
NOTE = "The run never read 3 of the 8,072 rows of the <b>index</b>."
UNTRACED = "This question was not traced through the run; ask it as a job: <b>9 minutes</b>."
LACKING = "The index has no <b>factors</b>\u202e of EK-FAC; build it with them."


def canned_estimators() -> EstimatorsResponse:
    """Five estimators; the second index answers for all but EK-FAC."""
    summaries = {
        "bm25": "Lexical similarity, a baseline.",
        "ekfac": "EK-FAC influence: <b>curvature</b> in K-FAC's eigenbasis.",
        "identity": "The dot product of gradients.",
        "kfac": "K-FAC influence.",
        "run": "Influence through the run.",
    }
    return EstimatorsResponse(
        estimators=[
            EstimatorSchema(
                name=name,
                summary=summary,
                by_gradients=name not in WITHOUT_GRADIENTS,
                influences=name != "bm25",
                indexes=[canned_offer(name, index) for index in OWN],
            )
            for name, summary in summaries.items()
        ]
    )


def canned_offer(name: str, index: str) -> OfferSchema:
    """Whether an index answers for an estimator."""
    return OfferSchema(
        index=index,
        own=OWN[index] == name,
        parameters={
            parameter: ParameterSchema(
                summary=f"Of {name}, a {parameter}.", default=default, least=1e-6, most=1e6
            )
            for parameter, default in DEFAULTS.get(name, {}).items()
        },
        unavailable=LACKING if (name, index) == ("ekfac", "<b>b</b>") else None,
    )


def canned_result(request: QueryRequest, direction: str, rank: int, text: str) -> ResultSchema:
    """A result whose numbers follow from its place."""
    sign = 1 if direction == "proponents" else -1
    score = sign * 12523.25 / rank**1.5
    pieces = [text[i : i + 5] for i in range(0, len(text), 5)][:400]
    shares = [((7 * i) % 11 - 3) for i in range(len(pieces))]
    total = sum(shares) or 1
    layer_shares = [(3 * i) % 7 - 1 for i in range(len(LAYERS))]
    return ResultSchema.model_validate(
        {
            "rank": rank,
            "direction": direction,
            "row": 100 * rank + (sign < 0),
            "id": f"facts/{rank}#<b>{direction}</b>",
            "document": f"Country {rank}: Capital",
            "text": text,
            "metadata": {"year": 1990 + rank, "licence": "none", "<i>note</i>": text[:60]},
            "score": score,
            "normalised_score": score / 105.2,
            "proxy": 0.97 * score,
            "gradient_norm": 105.2,
            "tokens": [
                TokenSchema(text=piece, score=score * share / total)
                for piece, share in zip(pieces, shares, strict=True)
            ]
            if request.tokens
            else None,
            "layers": {
                name: score * share / sum(layer_shares)
                for name, share in zip(LAYERS, layer_shares, strict=True)
            }
            if request.layers
            else None,
            "cluster": {1: 0, 2: 1, 3: 0}.get(rank, rank) if request.clusters else None,
            "effect_of_removal": {
                "nats": -2e-5 * score,
                "low": -2e-5 * score - 0.05,
                "high": -2e-5 * score + 0.05,
                "confidence": 0.9,
            }
            if request.prompt == MEASURED
            else None,
        }
    )


def texts_of(request: QueryRequest) -> list[str]:
    """What the corpus holds, by the prompt."""
    if request.prompt == "hostile":
        return [*HOSTILE_TEXTS, "long " * 4000]
    return [*PLAIN_TEXTS, "A long example, sentence by sentence. " * 60]


def sides_of(request: QueryRequest) -> list[str]:
    """The directions that are asked for."""
    both = request.direction == "both"
    return ["proponents", "opponents"] if both else [request.direction]


def canned_measurement(request: QueryRequest) -> MeasurementSchema:
    """What was explained."""
    term = TermSchema(
        prompt=request.prompt or "".join(f"<|user|>{m.content}" for m in request.messages or ()),
        completion=request.completion or " Kabul.",
        against=request.against,
        weight=1.0,
        completed_by_model=request.completion is None,
        log_probability=-3.3,
        against_log_probability=None if request.against is None else -7.5,
        completion_tokens=3,
        caution=CAUTION if request.prompt == "" else None,
    )
    return MeasurementSchema(value=-3.3 if request.against is None else 4.2, terms=[term])


def canned_certificates(request: QueryRequest, direction: str) -> list[CertificateSchema]:
    """One certificate of every status."""
    shared = {
        "direction": direction,
        "recall_target": request.recall,
        "confidence": request.confidence,
        "scope": "this answer's top k by the exact scorer, over all rows of the index",
    }
    return [
        CertificateSchema(
            type="sketch",
            status="certified",
            recall_lower_bound=0.9,
            probability_over="the random draw of the sketch",
            assumptions=[
                "the sketch's seed is independent of the corpus and of the query",
                "its noise is normal, of the measured scale",
            ],
            observed={"rows": ROWS, "rescored_rows": 96, "calibration_mean_square": 0.98213},
            sentence="With 95% confidence, at least 9 of the 10 highest-scoring training examples "
            f"by the exact score are in this answer (96 of {ROWS:,} rows scored exactly).",
            **shared,
        ),
        CertificateSchema(
            type="audit",
            status="not certified",
            recall_lower_bound=0.0,
            probability_over="the random choice of the audited rows",
            assumptions=[],
            observed={"unscored_rows": 7976, "sampled_rows": 64, "sampled_above_threshold": 0},
            sentence="Of 64 unscored rows drawn at random and scored exactly, 0 beat the k-th "
            "result; with 95% confidence at most 4.55% of the 7,976 unscored rows (363) do.",
            **shared,
        ),
        CertificateSchema(
            type="calibration",
            status="refused",
            recall_lower_bound=None,
            probability_over="the choice of the calibration queries",
            assumptions=["this query is of the same kind as the calibration queries"],
            observed={"calibration_queries": 64, "effort_unit": "rows"},
            sentence="No statement: the index was changed after it was calibrated.",
            **shared,
        ),
    ]


def canned_share(direction: str) -> ShareSchema:
    """What part of all influence the results carry."""
    influence = "positive" if direction == "proponents" else "negative"
    return ShareSchema.model_validate(
        {
            "direction": direction,
            "estimate": 0.31,
            "low": 0.24,
            "high": 0.39,
            "confidence": 0.95,
            "sampled": 64,
            "sentence": f"The 6 results carry 31% of all {influence} influence (24% to 39% at 95% "
            "confidence, from 64 random rows of 7,976).",
        }
    )


def canned_removal(direction: str) -> JointRemovalSchema:
    """What leaving all results of a direction out would do."""
    return JointRemovalSchema.model_validate(
        {
            "direction": direction,
            "rows": 6,
            "nats": -0.5,
            "low": -0.9,
            "high": -0.3,
            "confidence": 0.95,
            "sentence": "Leaving all 6 results out of the training together: -0.5 nats.",
        }
    )


def canned_answer(request: QueryRequest) -> QueryResponse:
    """The whole answer."""
    sides = sides_of(request)
    estimator = request.estimator or OWN[request.index]
    return QueryResponse(
        measurement=canned_measurement(request),
        index=request.index,
        estimator=estimator,
        parameters={**DEFAULTS.get(estimator, {}), **request.parameters},
        estimator_sha256="5e" * 32,
        by_gradients=estimator not in WITHOUT_GRADIENTS,
        influences=estimator != "bm25",
        notes=[NOTE] if estimator == "run" else [],
        sign_and_unit=WITHOUT_GRADIENTS.get(estimator, SIGN_AND_UNIT),
        effect=EffectSchema(
            nats_per_unit=2e-5,
            low=1e-5,
            high=4e-5,
            confidence=0.95,
            measured_by="A trace of 12 questions: to first order, one row at a time.",
        )
        if request.prompt == MEASURED
        else None,
        effect_reason=None if request.prompt == MEASURED else NO_SCALE,
        removals=[canned_removal(side) for side in sides] if request.prompt == MEASURED else [],
        ranking=request.ranking,
        results=[
            canned_result(request, side, rank, text)
            for side in sides
            for rank, text in enumerate(texts_of(request)[: request.k], 1)
            if (estimator, rank) != ("run", 2)  # so that not all estimators agree
        ],
        documents=[
            DocumentSchema(document="Country 1: Capital", rows=12, found=1, score=20134.5),
            DocumentSchema(document="Country 2: <b>Capital</b>", rows=4021, found=1, score=None),
        ]
        if request.documents
        else [],
        certificates=[c for side in sides for c in canned_certificates(request, side)],
        shares=[canned_share(side) for side in sides],
        partial=request.deadline is not None,
        rows_to_certify=None if request.deadline is None else 2300,
        seconds_to_certify=None if request.deadline is None else 4.2,
        rescored_rows=32,
        sampled_rows=128,
        rows=ROWS,
        seed=BIG_SEED if request.seed is None else request.seed,
        seconds={"gradient": 0.21, "scan": 0.02, "rescore": 0.7},
    )


class CannedService:
    """Remembers what it was asked; ``gate`` holds back the end of a "gated" query's stream."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.hung_up = threading.Event()
        self.jobs: list[list[QueryRequest]] = []

    def app(self) -> FastAPI:
        """The page and the routes that it uses."""
        app = FastAPI()
        install_page(app)

        @app.get("/v1/index")
        async def indexes() -> dict[str, Any]:
            first = {"name": "default", "rows": ROWS, "chat_template": True}
            return {"indexes": [first, {"name": "<b>b</b>", "rows": 1, "chat_template": False}]}

        @app.get("/v1/suggestions")
        async def suggestions(index: str) -> SuggestionsResponse:
            prompts = SUGGESTED if index == "default" else []
            return SuggestionsResponse(
                suggestions=[SuggestionSchema(prompt=p, id=f"facts/{p}") for p in prompts]
            )

        @app.get("/v1/estimators")
        async def estimators() -> EstimatorsResponse:
            return canned_estimators()

        @app.post("/v1/query/stream")
        async def stream(request: Request) -> Any:
            asked = QueryRequest.model_validate_json(await request.body())
            self.asked.append(await request.json())
            if asked.prompt == "refused":
                problem = canned_problem(
                    422, "The query cannot be measured", "It has <b>no</b> token."
                )
                return JSONResponse(
                    problem.model_dump(), 422, media_type="application/problem+json"
                )
            return StreamingResponse(self._events(asked), media_type="text/event-stream")

        self._add_job_routes(app)
        return app

    def _add_job_routes(self, app: FastAPI) -> None:
        """A job is queued, then running, then finished; one about " gone" has a problem."""
        looks: dict[str, int] = {}

        @app.post("/v1/jobs", status_code=202)
        async def submit(body: JobRequest) -> JobResponse:
            self.jobs.append(body.queries)
            return canned_job(f"{len(self.jobs):032x}", "queued", failed=0)

        @app.get("/v1/jobs/{job_id}")
        async def look(job_id: str) -> JobResponse:
            looks[job_id] = looks.get(job_id, 0) + 1
            failed = int(self._asked_by(job_id).completion == " gone")
            return canned_job(job_id, "running" if looks[job_id] == 1 else "finished", failed)

        @app.get("/v1/jobs/{job_id}/results")
        async def results(job_id: str) -> JobResultsResponse:
            problem = canned_problem(503, "The recorded run cannot be used", "<b>It is gone.</b>")
            return JobResultsResponse(
                results=[JobResultSchema(number=0, problem=problem)], next=None
            )

    def _asked_by(self, job: str) -> QueryRequest:
        return self.jobs[int(job, 16) - 1][0]

    def _is_traced(self, request: QueryRequest) -> bool:
        done = [(one.prompt, one.completion) for queries in self.jobs for one in queries]
        return (request.prompt, request.completion) in done

    async def _events(self, request: QueryRequest) -> AsyncIterator[str]:
        try:
            yield event("gradient", GradientEvent(measurement=canned_measurement(request)))
            await asyncio.sleep(0.05)
            yield event("candidates", CandidatesEvent(rows=ROWS, seconds=0.25))
            async for piece in self._progress(request):
                yield piece
            if request.prompt == "broken":
                problem = canned_problem(503, "Not enough memory for this query", "Ask for fewer.")
                yield event("error", problem)
            elif (request.prompt, request.estimator) == ("untraced", "run") and not self._is_traced(
                request
            ):
                yield event("error", canned_problem(422, "The question was not traced", UNTRACED))
            elif request.prompt != "cut":
                yield event("result", canned_answer(request))
        except asyncio.CancelledError:
            self.hung_up.set()
            raise

    async def _progress(self, request: QueryRequest) -> AsyncIterator[str]:
        for step in range(1, 4):
            await asyncio.sleep(0.05)
            plain = request.model_copy(update={"tokens": False, "layers": False, "clusters": False})
            for side in sides_of(request):
                texts = texts_of(request)[: min(step, request.k)]
                results = [canned_result(plain, side, r, t) for r, t in enumerate(texts, 1)]
                yield event(
                    "progress",
                    ProgressEvent(
                        direction=side,
                        rescored_rows=16 * step,
                        sampled_rows=64,
                        recall_lower_bound=None if step == 1 else 0.3 * step,
                        results=results,
                        seconds=0.25 + 0.2 * step,
                    ),
                )
        while request.prompt == "gated" and not self.gate.is_set():
            await asyncio.sleep(0.02)


def event(name: str, data: Schema) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n"


def canned_problem(status: int, title: str, detail: str) -> ProblemResponse:
    """A problem document."""
    return ProblemResponse(
        type="about:blank", title=title, status=status, detail=detail, instance="/v1/query/stream"
    )


def canned_job(
    job: str, state: Literal["queued", "running", "finished"], failed: int
) -> JobResponse:
    """How far a job of one query is."""
    time = "2026-01-01T00:00:00Z"
    return JobResponse(
        id=job, state=state, queries=1, answered=0, failed=failed, created=time, updated=time
    )


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port of this machine; gives its URL."""
    config = uvicorn.Config(
        app, port=0, log_config=None, log_level=None, access_log=False, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()
