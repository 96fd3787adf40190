"""Parts of a measurement, each in a process of its own and with a limit of time.

So a part that runs out of memory, hangs or breaks the device's context takes no other with it, and
its memory is free when the next one begins. The processes are forks of one that has imported what
takes long, and that never touches the device.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from scripts.bench.gpu.measuring import Report, Row

Work = Callable[[Report], None]
"""Measures, and reports each row as soon as it is measured."""


@dataclass(frozen=True)
class Failed:
    """Why a part ended before its end, in one sentence."""

    reason: str


_CONTEXT = multiprocessing.get_context("forkserver")


def run_part(work: Work, seconds: float) -> Iterator[Row | Failed]:
    """Rows of a part as they are measured; last, if it failed, why.

    Args:
        work: a function of a module, or a ``functools.partial`` of one.
        seconds: after which the part is stopped, counted from when its process runs.
    """
    _CONTEXT.set_forkserver_preload(["scripts.bench.gpu.parts"])
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(work, sender), daemon=True)
    process.start()
    sender.close()
    limit = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, limit - time.monotonic())):
            message = receiver.recv()
            if message is None:
                return
            yield message
            if isinstance(message, Failed):
                return
        yield Failed(f"It was stopped after {seconds:.0f} seconds, its limit.")
    except EOFError:
        process.join(10)
        yield Failed(f"Its process ended without a word, with exit status {process.exitcode}.")
    finally:
        process.kill()
        process.join()


def _work(work: Work, sender: Connection) -> None:
    """In the other process: rows, then None or what went wrong."""
    try:
        work(sender.send)
    except Exception as error:  # noqa: BLE001 - told to the other process, which goes on
        first = str(error).strip().splitlines()[:1]
        sender.send(Failed(": ".join([type(error).__name__, *first])))
    else:
        sender.send(None)
