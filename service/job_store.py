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
TABLES = """
CREATE TABLE job (
    id TEXT PRIMARY KEY, created TEXT NOT NULL, updated TEXT NOT NULL, state TEXT NOT NULL,
    key TEXT UNIQUE, digest TEXT NOT NULL
);
CREATE TABLE query (
    job TEXT NOT NULL REFERENCES job ON DELETE CASCADE, number INTEGER NOT NULL,
    request TEXT NOT NULL, answer TEXT, problem TEXT,
    PRIMARY KEY (job, number)
) WITHOUT ROWID;
"""


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


class JobStore:
    """Jobs on disk. What a method has returned from is durable; one caller at a time.

    Args:
        path: of the file; made if there is none.
        most: jobs kept at a time.

    Raises:
        ValueError: the file is no such database, damaged, or of a later version.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._most = most
        self._turn = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._prepare()
        except (sqlite3.Error, OSError) as error:
            raise ValueError(
                f"The file of jobs, {path}, cannot be used ({error}); name another in "
                f"ETYMON_JOBS_PATH, or move it away to begin with none."
            ) from error

    def _prepare(self) -> None:
        database = self._database
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise sqlite3.DatabaseError(f"it is of version {version}, this service knows {VERSION}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        if version == 0:
            database.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        broken = database.execute("PRAGMA quick_check").fetchone()[0]
        if broken != "ok":
            raise sqlite3.DatabaseError(broken)

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
                "INSERT INTO job VALUES (?, ?, ?, 'queued', ?, ?)", (job, now, now, key, digest)
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
            rows = self._database.execute("SELECT id FROM job ORDER BY created DESC, rowid DESC")
            return [self._job(row[0]) for row in rows.fetchall()]

    def outcomes(self, job: str, start: int, limit: int) -> list[Outcome]:
        """Outcomes that there are, from query ``start`` on, at most ``limit``.

        Raises:
            UnknownJob: there is no such job.
        """
        with self._turn:
            self._job(job)
            rows = self._database.execute(
                "SELECT number, answer, problem FROM query WHERE job = ? AND number >= ? AND "
                "(answer IS NOT NULL OR problem IS NOT NULL) ORDER BY number LIMIT ?",
                (job, start, limit),
            )
            return [Outcome(number=n, answer=a, problem=p) for n, a, p in rows.fetchall()]

    def open_queries(self, limit: int) -> list[tuple[str, int, str]]:
        """Job, number and request of queries without an outcome, oldest jobs first."""
        with self._turn:
            rows = self._database.execute(
                "SELECT job, number, request FROM query JOIN job ON job.id = job "
                "WHERE answer IS NULL AND problem IS NULL ORDER BY created, job.rowid, number "
                "LIMIT ?",
                (limit,),
            )
            found: list[tuple[str, int, str]] = rows.fetchall()
            return found

    def begin(self, job: str) -> None:
        """Say that its first query's turn has come."""
        with self._writing() as database:
            database.execute(
                "UPDATE job SET state = 'running', updated = ? WHERE id = ? AND state = 'queued'",
                (_now(), job),
            )

    def record(self, job: str, number: int, *, answer: str | None, problem: str | None) -> bool:
        """Keep an outcome; False if there is one already or the job was deleted."""
        with self._writing() as database:
            done = database.execute(
                "UPDATE query SET answer = ?, problem = ? WHERE job = ? AND number = ? AND "
                "answer IS NULL AND problem IS NULL",
                (answer, problem, job, number),
            )
            left = database.execute(
                "SELECT count(*) FROM query WHERE job = ? AND answer IS NULL AND problem IS NULL",
                (job,),
            ).fetchone()[0]
            state = "running" if left else "finished"
            database.execute(
                "UPDATE job SET state = ?, updated = ? WHERE id = ?", (state, _now(), job)
            )
            return done.rowcount == 1

    def delete(self, job: str) -> None:
        """Forget a job.

        Raises:
            UnknownJob: there is none of this id.
        """
        with self._writing() as database:
            self._job(job)
            database.execute("DELETE FROM job WHERE id = ?", (job,))

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
        row: Any = self._database.execute(
            "SELECT id, state, created, updated, count(number), count(answer), count(problem) "
            "FROM job LEFT JOIN query ON query.job = job.id WHERE job.id = ? GROUP BY job.id",
            (job,),
        ).fetchone()
        if row is None:
            raise UnknownJob(f"There is no job '{job}'; it may have been deleted.")
        identifier, state, created, updated, queries, answered, failed = row
        return Job(
            id=identifier,
            state=state,
            queries=queries,
            answered=answered,
            failed=failed,
            created=created,
            updated=updated,
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
