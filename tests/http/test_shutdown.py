"""The whole service in a process: told to end, it leaves nobody without an answer."""

import json
import os
import signal
import threading
from typing import Any

import httpx

from tests.commands import Command, Nursery
from tests.service_fixtures import Workspace

ASKED = {"prompt": "The capital of France is", "completion": " Paris", "k": 3, "tokens": True}


def start(nursery: Nursery, workspace: Workspace) -> tuple[Command, str]:
    process = nursery.start(
        "scripts.serve",
        *("--model", workspace.model, "--index", f"default={workspace.index}", "--port", 0),
        environment={**os.environ, "ETYMON_MAX_TOGETHER": "2", "ETYMON_MAX_IN_FLIGHT": "16"},
        quiet=True,
    )
    return process, json.loads(process.stdout.readline())["url"]


def test_sigterm_answers_or_refuses_everything_that_was_accepted(
    workspace: Workspace, nursery: Nursery
) -> None:
    process, url = start(nursery, workspace)
    outcomes: list[Any] = []
    busy = threading.Event()

    def asks() -> None:
        while True:
            try:
                response = httpx.post(f"{url}/v1/query", json=ASKED, timeout=30)
            except httpx.HTTPError as error:
                outcomes.append(error)
                return
            outcomes.append(response)
            busy.set()
            if response.status_code == 503:  # told to go elsewhere, a client does
                return

    threads = [threading.Thread(target=asks) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert busy.wait(30)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    with process:
        assert process.wait(20) == 0
    assert all(isinstance(outcome, httpx.Response) for outcome in outcomes), outcomes
    assert {response.status_code for response in outcomes} == {200, 503}
    for response in outcomes:
        if response.status_code == 503:
            assert response.json()["title"] == "Shutting down"
