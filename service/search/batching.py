"""Queries that arrive together share the gradient pass, the scan and the rescoring passes.

One thread computes; it uses all cores, and captures gradients through hooks on the one model.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int

from service.errors import DeadlinePassed, ShuttingDown
from service.scoring.rows import Target
from service.search.answer import Answer
from service.search.query import Query
from service.search.retrieval import Retriever
from service.search.run import Run
from service.search.search import Steps

ROUND_SECONDS = 0.25
"""A pass over rows takes about so long; between passes queries join, end and are dropped."""

FIRST_ROWS = 8
"""So many before it is known how long one takes."""
HELD_ROUNDS = 8
"""For so many passes an audit waits for those of other queries."""
BREATH_SECONDS = 2e-4
"""Between passes, so that others who wait for the model get their turn."""

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A query that waits or is under way.

    Attributes:
        retriever: that answers it.
        query: what is asked.
        deadline: ``time.monotonic()`` at which its answer is due; inf for no hurry.
        background: whether it gives way to others.
        watch: told of "gradient", "candidates" and "progress", in the computing thread.
        outcome: its answer or error; cancelling it drops the query.
    """

    retriever: Retriever
    query: Query
    deadline: float = math.inf
    background: bool = False
    watch: Callable[[str, Run], None] | None = None
    outcome: Future[Answer] = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it was dropped."""
        try:
            self.outcome.set_exception(error)
        except InvalidStateError:
            log.debug("a dropped query failed: %s", error)


@dataclass(eq=False)
class _Member:
    """A query under way, with the rows that it waits for."""

    ticket: Ticket
    run: Run
    steps: Steps[Answer]
    wanted: Int[np.ndarray, "wanted"] | None = None
    held: int = 0
    scores: list[Float[np.ndarray, "scored"]] = field(default_factory=list)

    def advance(self, scores: Float[np.ndarray, "scored"] | None) -> None:
        """Hand over scores, go on until rows are wanted or the answer is there."""
        try:
            self.wanted = next(self.steps) if scores is None else self.steps.send(scores)
            self.scores = []
        except StopIteration as ended:
            self.wanted = None
            try:
                self.ticket.outcome.set_result(ended.value)
            except InvalidStateError:
                log.debug("a dropped query was answered")
        except Exception as error:  # noqa: BLE001 - told to whoever asked; the others go on
            self.wanted = None
            self.ticket.fail(error)

    def next_rows(self, most: int) -> Int[np.ndarray, "next"]:
        """The next rows to score, at most so many."""
        assert self.wanted is not None
        done = sum(map(len, self.scores))
        return self.wanted[done : done + most]

    def take(self, scores: Float[np.ndarray, "scored"]) -> None:
        """Scores of the rows that were named last."""
        assert self.wanted is not None
        self.scores.append(scores)
        if sum(map(len, self.scores)) == len(self.wanted):
            self.advance(np.concatenate(self.scores))
        if self.ticket.watch is not None and self.wanted is not None:
            self.ticket.watch("progress", self.run)

    def end(self) -> None:
        """Answer with what is there."""
        self.run.end()
        self.advance(np.concatenate([np.empty(0), *self.scores]))


class Batcher:
    """Answers queries, several at a time.

    Newcomers begin together as soon as they are as many as those that are under way, so that they
    share most; alone they begin at once.

    Args:
        most_together: queries under way at a time; each holds a gradient of the model's size.
    """

    def __init__(self, most_together: int) -> None:
        self._most = most_together
        self._waiting: deque[Ticket] = deque()
        self._background: deque[Ticket] = deque()
        self._members: list[_Member] = []
        self._changed = threading.Condition()
        self._closed = False
        self._due = math.inf
        self._seconds_per_row = 0.0
        self._passes = 0
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Queries whose turn has not come."""
        return len(self._waiting) + len(self._background)

    @property
    def together(self) -> int:
        """Queries under way."""
        return len(self._members)

    def submit(self, ticket: Ticket) -> None:
        """Put a query in line.

        Raises:
            ShuttingDown: no more are taken.
        """
        with self._changed:
            if self._closed:
                raise ShuttingDown("The service is shutting down; ask again in a moment.")
            (self._background if ticket.background else self._waiting).append(ticket)
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Refuse what waits, and let what is under way answer within ``seconds``."""
        with self._changed:
            self._closed = True
            refused = [*self._waiting, *self._background]
            self._waiting.clear()
            self._background.clear()
            self._due = time.monotonic() + seconds
            self._changed.notify()
        for ticket in refused:
            ticket.fail(ShuttingDown("The service is shutting down; ask again in a moment."))

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, at most so long."""
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._members or self._waiting or self._background or self._closed):
                    self._changed.wait()
                if self._closed and not self._members:
                    return
                newcomers = self._pick()
            try:
                self._begin(newcomers)
                self._end_some()
                self._round()
                time.sleep(BREATH_SECONDS)
            except Exception as error:
                log.exception("queries under way failed")
                for ticket in [*newcomers, *(member.ticket for member in self._members)]:
                    ticket.fail(error)
                self._members = []

    def _pick(self) -> list[Ticket]:
        picked: list[Ticket] = []
        free = self._most - len(self._members)
        soon = time.monotonic() + ROUND_SECONDS
        for queue, room in ((self._waiting, free), (self._background, free - 1)):
            for ticket in [t for t in queue if t.outcome.cancelled() or t.deadline <= soon]:
                queue.remove(ticket)
                ticket.fail(DeadlinePassed("The deadline passed before the query's turn came."))
            together = len(queue) >= min(len(self._members), room)
            if queue is self._background and (self._waiting or picked):
                continue
            while queue and together and len(picked) < room:
                picked.append(queue.popleft())
        if not picked and not self._members and self._background:
            picked.append(self._background.popleft())
        return picked

    def _begin(self, newcomers: list[Ticket]) -> None:
        for group in _grouped(newcomers, lambda ticket: ticket.retriever):
            retriever = group[0].retriever
            try:
                with retriever.loaded.turn:
                    outcomes = retriever.begin([ticket.query for ticket in group])
            except Exception as error:  # noqa: BLE001 - told to whoever asked
                if len(group) > 1:
                    for ticket in group:
                        self._begin([ticket])
                else:
                    group[0].fail(error)
                continue
            for ticket, run in zip(group, outcomes, strict=True):
                if isinstance(run, Exception):
                    ticket.fail(run)
                    continue
                for name in ("gradient", "candidates"):
                    if ticket.watch is not None:
                        ticket.watch(name, run)
                member = _Member(ticket, run, run.steps())
                self._members.append(member)
                member.advance(None)

    def _end_some(self) -> None:
        """Drop what nobody waits for, end what is due before the next pass would be over."""
        soon = time.monotonic() + 2 * max(ROUND_SECONDS, self._seconds_per_row)
        for member in self._members:
            if member.ticket.outcome.cancelled():
                member.wanted = None
            elif member.wanted is not None and min(member.ticket.deadline, self._due) <= soon:
                member.end()
        self._members = [member for member in self._members if member.wanted is not None]

    def _round(self) -> None:
        """Score rows for one or some of the queries, for about ``ROUND_SECONDS``."""
        for together in _grouped(self._members, lambda member: member.run.scoring):
            self._passes += 1
            group = _next(together, oldest=self._passes % 2 == 0)
            most = ROUND_SECONDS / self._seconds_per_row if self._seconds_per_row else FIRST_ROWS
            share = max(1, int(most))
            asked = [(member.run.target, member.next_rows(share)) for member in group]
            start = time.perf_counter()
            scores = self._score(group, asked)
            rows = len(np.unique(np.concatenate([rows for _, rows in asked])))
            self._seconds_per_row = (time.perf_counter() - start) / rows
            for member, found in zip(group, scores, strict=True):
                if found is None:
                    member.wanted = None
                else:
                    member.take(found)
        self._members = [member for member in self._members if member.wanted is not None]

    def _score(
        self, group: list[_Member], asked: list[tuple[Target, Int[np.ndarray, "row"]]]
    ) -> list[Float[np.ndarray, "row"] | None]:
        """Scores of each member; None for one that failed."""
        try:
            with group[0].ticket.retriever.loaded.turn:
                return list(group[0].run.scoring.score(asked))
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            if len(group) == 1:
                group[0].ticket.fail(error)
                return [None]
        return [self._score([m], [a])[0] for m, a in zip(group, asked, strict=True)]


def _next(members: list[_Member], *, oldest: bool) -> list[_Member]:
    """Whose rows are scored in the next pass.

    Random rows of all that want some, since most of them are the same; otherwise the rows of the
    query that has had the fewest, so that short searches do not wait for long ones, or in every
    other pass of the oldest, so that long ones do not wait for ever. Audits wait a little for those
    of other queries.
    """
    stages: dict[str, list[_Member]] = {"calibrate": [], "rescore": [], "audit": []}
    for member in members:
        stages[member.run.stage].append(member)
    searching, audits = stages["rescore"], stages["audit"]
    if stages["calibrate"]:
        return stages["calibrate"]
    if searching and all(member.held < HELD_ROUNDS for member in audits):
        for member in audits:
            member.held += 1
        return searching[:1] if oldest else [min(searching, key=lambda m: m.run.scored_rows)]
    return audits or searching


T = TypeVar("T")


def _grouped(things: Iterable[T], owner: Callable[[T], object]) -> list[list[T]]:
    groups: dict[int, list[T]] = {}
    for thing in things:
        groups.setdefault(id(owner(thing)), []).append(thing)
    return list(groups.values())
