"""A process that traces questions for a service: ``python -m service.tracing.worker``.

It reads one JSON line from stdin, writes one to stdout, and ends when stdin is closed. It has a
model of its own, and gives way to the service: it asks the system for less of the processors.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from estimators.names import RUN_DIRECTION
from service.checkpoints import ModelSource
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.tracing.directions import trace_directions
from service.tracing.trace import trace_run
from service.tracing.walk import from_json

NICENESS = 10
"""Added to the process's own; others get the processors first."""


def trace(order: dict[str, Any]) -> None:
    """Trace what is ordered, or finish it if it was interrupted.

    Args:
        order: "run", "out" (folders), "source" (of the model before training, or None),
            "questions", the "estimator" that they are traced for, and for the influence of rows the
            "smallest_moment".
    """
    run = RecordedRun.open(Path(order["run"]))
    source = order["source"] and ModelSource(**order["source"])
    model = load_first_model(run, source)
    questions = [from_json(one) for one in order["questions"]]
    out = Path(order["out"])
    if order["estimator"] == RUN_DIRECTION:
        trace_directions(run, model, questions, out, {}, source=source)
    else:
        smallest = order["smallest_moment"]
        trace_run(run, model, questions, out, {}, smallest=smallest, source=source)


def main() -> int:
    """Carry out one order; what is wrong is told in a sentence."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_service, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    told: dict[str, str] = {}
    try:
        trace(order)
    except OSError as error:
        told["error"] = f"{error}; see that {order['out']} can be written to, and has room."
    except (ValueError, RuntimeError) as error:
        told["error"] = str(error)
    print(json.dumps(told), file=answers, flush=True)
    return 0


def _end_with_the_service() -> None:
    """Nobody waits for a trace whose service has gone; what was done is kept."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
