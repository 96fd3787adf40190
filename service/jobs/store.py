"""Jobs in a SQLite file: what was asked and what came of it, whatever ends the process."""

import hashlib
import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from service.errors import Conflict, TooManyJobs, UnknownJob

JobState = Literal["queued", "running", "finished"]

VERSION = 1

APPLICATION = 0x4574796D
"""Marks the file as one of this service's, as SQLite provides for ("Etym")."""

LOCK_SECONDS = 2.0
"""A file that another process has open is waited for so long: that one may be about to end."""

PAGE_CHARACTERS = 2**24
"""After so many characters of outcomes, a page of them has no more."""

TABLES = """
CREATE TABLE job (
    id TEXT PRIMARY KEY, created TEXT NOT NULL, updated TEXT NOT NULL, state TEXT NOT NULL,
    key TEXT UNIQUE, digest TEXT NOT NULL, queries INTEGER NOT NULL,
    answered INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE query (
    job TEXT NOT NULL REFERENCES job ON DELETE CASCADE, number INTEGER NOT NULL,
    request TEXT NOT NULL, begun INTEGER NOT NULL DEFAULT 0, answer TEXT, problem TEXT,
    PRIMARY KEY (job, number)
);
CREATE INDEX open_query ON query (job, number) WHERE answer IS NULL AND problem IS NULL;
"""

JOB = "SELECT id, state, queries, answered, failed, created, updated FROM job"

OPEN_QUERIES = """
SELECT job, number, request, begun
FROM job CROSS JOIN query INDEXED BY open_query ON job.id = job
WHERE state != 'finished' AND answer IS NULL AND problem IS NULL
AND job.id NOT IN (SELECT value FROM json_each(?2))
ORDER BY job.rowid, number LIMIT ?1
"""
"""SQLite takes the order of these joins and this index only when it is told to."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job and how far it is.

    Attributes:
        id: random.
        state: "queued" until its first query's turn comes, "finished" once all have an outcome.
        queries: how many it has.
        answered: with an answer.
        failed: with a problem.
        created: ISO 8601, UTC.
        updated: ISO 8601, UTC.
    """

    id: str
    state: JobState
    queries: int
    answered: int
    failed: int
    created: str
    updated: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a job's query: the JSON text of an answer or of a problem document."""

    number: int
    answer: str | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class OpenQuery:
    """A query without an outcome.

    Attributes:
        job: that it is of.
        number: in the job, from 0.
        request: its JSON text.
        begun: how often it was begun and the process ended before there was an outcome.
    """

    job: str
    number: int
    request: str
    begun: int


class JobStore:
    """Jobs on disk. What a method has returned from is durable; one caller at a time.

    The file is this process's alone, and only its owner can read it.

    Args:
        path: of the file; made if there is none.
        most: jobs kept at a time.

    Raises:
        ValueError: the file is no such database, damaged, of a later version or in use.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._most = most
        self._turn = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._database = sqlite3.connect(
                path, timeout=LOCK_SECONDS, check_same_thread=False, isolation_level=None
            )
        except (sqlite3.Error, OSError) as error:
            raise _unusable(path, error) from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._database.close()
            raise _unusable(path, error) from error

    def _prepare(self) -> None:
        database = self._database
        # A second service on the same file would answer every query once more.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("BEGIN EXCLUSIVE")
        application, version = self._pragma("application_id"), self._pragma("user_version")
        if not (application or version or self._pragma("schema_version")):
            for statement in filter(str.strip, TABLES.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {APPLICATION}")
            database.execute(f"PRAGMA user_version = {VERSION}")
        elif application != APPLICATION:
            raise sqlite3.DatabaseError("it is a database of something else")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"it is of version {version}, this service knows {VERSION}")
        database.execute("COMMIT")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA secure_delete = ON")
        broken = self._pragma("quick_check(1)")
        if broken != "ok":
            raise sqlite3.DatabaseError(str(broken).splitlines()[0])

    def _pragma(self, name: str) -> Any:
        return self._database.execute(f"PRAGMA {name}").fetchone()[0]

    def close(self) -> None:
        """Give the file back."""
        with self._turn:
            self._database.close()

    def add(self, requests: Sequence[str], key: str | None) -> Job:
        """Keep a new job; with a key that was used for the same requests, give that job.

        Raises:
            Conflict: the key was used for other requests.
            TooManyJobs: as many are kept as may be.
        """
        digest = hashlib.sha256(json.dumps(list(requests)).encode()).hexdigest()
        with self._writing() as database:
            found = database.execute("SELECT id, digest FROM job WHERE key = ?", (key,)).fetchone()
            if found is not None and key is not None:
                if found[1] != digest:
                    raise Conflict(
                        f"The Idempotency-Key '{key}' was used for another job, {found[0]}; give "
                        f"each job a key of its own."
                    )
                return self._job(found[0])
            if database.execute("SELECT count(*) FROM job").fetchone()[0] >= self._most:
                raise TooManyJobs(
                    f"{self._most:,} jobs are kept, as many as this service accepts; delete some "
                    f"(DELETE /v1/jobs/ID)."
                )
            job, now = uuid.uuid4().hex, _now()
            database.execute(
                "INSERT INTO job (id, created, updated, state, key, digest, queries) "
                "VALUES (?, ?, ?, 'queued', ?, ?, ?)",
                (job, now, now, key, digest, len(requests)),
            )
            database.executemany(
                "INSERT INTO query (job, number, request) VALUES (?, ?, ?)",
                ((job, number, request) for number, request in enumerate(requests)),
            )
            return self._job(job)

    def get(self, job: str) -> Job:
        """A job.

        Raises:
            UnknownJob: there is none of this id.
        """
        with self._turn:
            return self._job(job)

    def all(self) -> list[Job]:
        """All jobs, newest first."""
        with self._turn:
            rows = self._database.execute(f"{JOB} ORDER BY rowid DESC").fetchall()
            return [_as_job(row) for row in rows]

    def outcomes(self, job: str, start: int, limit: int) -> tuple[list[Outcome], int | None]:
        """Outcomes that there are, from query ``start`` on, at most ``limit`` and few large ones.

        Returns:
            The outcomes, and the number of the query whose outcome is next, if there is one.

        Raises:
            UnknownJob: there is no such job.
        """
        with self._turn:
            self._job(job)
            rows = self._database.execute(
                "SELECT number, answer, problem FROM query WHERE job = ? AND number >= ? AND "
                "(answer IS NOT NULL OR problem IS NOT NULL) ORDER BY number LIMIT ?",
                (job, start, limit + 1),
            )
            found: list[Outcome] = []
            size = 0
            for number, answer, problem in rows:
                if len(found) == limit or size > PAGE_CHARACTERS:
                    return found, number
                found.append(Outcome(number=number, answer=answer, problem=problem))
                size += len(answer or problem)
            return found, None

    def open_queries(self, limit: int, others_than: Sequence[str] = ()) -> list[OpenQuery]:
        """Queries without an outcome, oldest jobs first; none of the jobs ``others_than``."""
        with self._turn:
            rows = self._database.execute(OPEN_QUERIES, (limit, json.dumps(list(others_than))))
            return [OpenQuery(job=j, number=n, request=r, begun=b) for j, n, r, b in rows]

    def open_queries_of(self, job: str) -> list[OpenQuery]:
        """Those of one job, all of them."""
        with self._turn:
            rows = self._database.execute(
                "SELECT job, number, request, begun FROM query WHERE job = ? AND answer IS NULL "
                "AND problem IS NULL ORDER BY number",
                (job,),
            )
            return [OpenQuery(job=j, number=n, request=r, begun=b) for j, n, r, b in rows]

    def begin(self, job: str, number: int) -> None:
        """Say that a query's turn has come."""
        with self._writing() as database:
            database.execute(
                "UPDATE query SET begun = begun + 1 WHERE job = ? AND number = ?", (job, number)
            )
            database.execute(
                "UPDATE job SET state = 'running', updated = ? WHERE id = ? AND state = 'queued'",
                (_now(), job),
            )

    def forgive(self) -> None:
        """What was begun and has no outcome was not what ends the process."""
        with self._writing() as database:
            database.execute(
                "UPDATE query SET begun = 0 WHERE answer IS NULL AND problem IS NULL AND begun > 0"
            )

    def record(self, job: str, number: int, *, answer: str | None, problem: str | None) -> bool:
        """Keep an outcome; False if there is one already or the job was deleted."""
        with self._writing() as database:
            done = database.execute(
                "UPDATE query SET answer = ?, problem = ? WHERE job = ? AND number = ? AND "
                "answer IS NULL AND problem IS NULL",
                (answer, problem, job, number),
            )
            if done.rowcount == 1:
                database.execute(
                    "UPDATE job SET answered = answered + ?, failed = failed + ?, updated = ?, "
                    "state = iif(answered + failed + 1 = queries, 'finished', 'running') "
                    "WHERE id = ?",
                    (answer is not None, problem is not None, _now(), job),
                )
            return done.rowcount == 1

    def delete(self, job: str) -> None:
        """Forget a job; none of its texts stays in the file.

        Raises:
            UnknownJob: there is none of this id.
        """
        with self._writing() as database:
            self._job(job)
            database.execute("DELETE FROM job WHERE id = ?", (job,))
        with self._turn:
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def counts(self) -> dict[JobState, int]:
        """Jobs in each state."""
        counts: dict[JobState, int] = {"queued": 0, "running": 0, "finished": 0}
        with self._turn:
            counts.update(
                self._database.execute("SELECT state, count(*) FROM job GROUP BY state").fetchall()
            )
        return counts

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._turn:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _job(self, job: str) -> Job:
        row = self._database.execute(f"{JOB} WHERE id = ?", (job,)).fetchone()
        if row is None:
            raise UnknownJob(f"There is no job '{job}'; it may have been deleted.")
        return _as_job(row)


def _as_job(row: Any) -> Job:
    names = ("id", "state", "queries", "answered", "failed", "created", "updated")
    return Job(**dict(zip(names, row, strict=True)))


def _unusable(path: Path, error: sqlite3.Error | OSError) -> ValueError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
        return ValueError(
            f"The file of jobs, {path}, is in use by another process; give each service a file of "
            f"its own in ETYMON_JOBS_PATH."
        )
    return ValueError(
        f"The file of jobs, {path}, cannot be used ({error}); name another in "
        f"ETYMON_JOBS_PATH, or move it away to begin with none."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
