"""The whole service in a process: told to end, it leaves nobody without an answer."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

from tests.service_fixtures import Workspace

ROOT = Path(__file__).parents[2]
ASKED = {"prompt": "The capital of France is", "completion": " Paris", "k": 3, "tokens": True}


def start(workspace: Workspace) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "scripts.serve", "--model", str(workspace.model)]
    process = subprocess.Popen(
        [*command, "--index", f"default={workspace.index}", "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "ETYMON_MAX_TOGETHER": "2", "ETYMON_MAX_IN_FLIGHT": "16"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


def test_sigterm_answers_or_refuses_everything_that_was_accepted(workspace: Workspace) -> None:
    process, url = start(workspace)
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
