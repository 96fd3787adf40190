"""Having further questions traced beside a served trace, by a process of their own.

A process, not a thread: PyTorch's choice of attention kernel is one for a whole process, and a
trace needs the plain kernel, so that numbers of queries would depend on whether one is under way.
The system can also give a process less of the processors, and has all of its memory back when it
ends.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import service
from service.run.errors import RunFault
from service.tracing.parts import fingerprint_of
from service.tracing.served import ServedTrace, check_run, untraced
from service.tracing.walk import Question, as_json

ROOT = Path(service.__file__).parents[1]
WORKER = (sys.executable, "-m", "service.tracing.worker")

TOGETHER = 16
"""Most questions traced in one go; each holds an adjoint of the size of the optimizer's state."""

log = logging.getLogger(__name__)


async def trace_more(trace: ServedTrace, questions: Sequence[Question], estimator: str) -> None:
    """Trace those questions that were not traced; many together, since they share the passes.

    If it is cancelled, or the process ends, what was done is kept for the next time.

    Raises:
        RunFault: there is no run to trace through, or it cannot be traced.
    """
    asked = untraced(trace, questions, estimator)
    if not asked:
        return
    check_run(trace)
    for start in range(0, len(asked), TOGETHER):
        some = asked[start : start + TOGETHER]
        out = trace.place_for(map(fingerprint_of, some)).resolve()
        log.info("%d of %d questions are being traced into %s", len(some), len(asked), out)
        order = {
            "run": str(trace.run.resolve()),
            "source": trace.source and asdict(trace.source),
            "out": str(out),
            "estimator": estimator,
            "smallest_moment": trace.smallest_moment,
            "questions": [as_json(question) for question in some],
        }
        told = await _carried_out(order)
        if "error" in told:
            raise RunFault(f"The question cannot be traced: {told['error']}")


async def _carried_out(order: Mapping[str, object]) -> dict[str, str]:
    """What the process said at its end."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*WORKER, stdin=pipe, stdout=pipe, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(ConnectionError):  # it has ended; its status tells
            process.stdin.write(json.dumps(order).encode() + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise RunFault(
                f"The process that traced the question ended with status {await process.wait()}; "
                f"what was done is kept, so ask again, with more memory if that ran out."
            )
        found: dict[str, str] = json.loads(line)
        return found
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.stdin.close()
        await process.wait()
