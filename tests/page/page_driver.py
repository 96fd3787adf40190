"""Drives the page in a browser, whatever service is behind it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
ANSWER_MS = 60_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser with a profile of its own; skips the test where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium on the PATH to open the page with")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


class PageDriver:
    """The page as somebody uses it.

    ``complaints`` collects what must never happen: console errors (breaches of the content
    security policy are among them), uncaught errors, dialogs, and requests to elsewhere.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.complaints: list[str] = []
        self.context = browser.new_context(reduced_motion="reduce", **options)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda m: self._note(m.type in ("error", "warning"), m.text))
        self.page.on("pageerror", lambda error: self._note(True, str(error)))
        self.page.on("request", lambda r: self._note(not self._own(r.url), f"asked {r.url}"))
        self.page.on("dialog", self._refuse)
        self.open()

    def _note(self, wrong: bool, what: str) -> None:
        if wrong:
            self.complaints.append(what)

    def _own(self, url: str) -> bool:
        return url.startswith((self.url, f"blob:{self.url}", "data:"))

    def _refuse(self, dialog: Any) -> None:
        self._note(True, f"dialog {dialog.message}")
        dialog.dismiss()

    def open(self, fragment: str = "") -> None:
        """Go to the page afresh, perhaps with a link's fragment."""
        self.page.goto("about:blank")
        self.page.goto(self.url + fragment)
        self.page.locator("[name=index] option").first.wait_for(state="attached")

    def fill(self, prompt: str, completion: str | None = None, against: str | None = None) -> None:
        """Type the question; without a completion the model is to complete it."""
        self.page.fill("[name=prompt]", prompt)
        self.page.fill("[name=completion]", completion or "")
        self.page.set_checked("[name=contrast]", against is not None)
        if against is not None:
            self.page.fill("[name=against]", against)

    def open_options(self) -> None:
        """Unfold the options."""
        if not self.page.locator("details.options[open]").count():
            self.page.click("details.options > summary")

    def ask(self, prompt: str, completion: str | None = None, against: str | None = None) -> None:
        """Ask and wait for the end of the answer."""
        self.fill(prompt, completion, against)
        self.page.click("button:has-text('Ask')")
        self.wait_for_answer()

    def wait_for_answer(self) -> None:
        """Wait until certificates are shown."""
        self.shown("certificate").first.wait_for(timeout=ANSWER_MS)

    def shown(self, name: str) -> Locator:
        """The parts of the page with this ``data-testid``."""
        return self.page.get_by_test_id(name)

    def texts(self) -> list[str]:
        """The texts of the results in order, folded ones left out."""
        return self.shown("text").all_inner_texts()

    def download(self, label: str) -> str:
        """What a download button saves."""
        with self.page.expect_download() as caught:
            self.page.click(f"text={label}")
        return caught.value.path().read_bytes().decode()

    def accessibility_faults(self, *rules: str) -> list[str]:
        """Breaches of WCAG and of good practice that axe calls more than minor, or of ``rules``."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(AXE.read_text())
        options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
        found = self.page.evaluate("options => axe.run(document, options)", options)
        return [
            f"{fault['id']}: {node['html'][:200]} {node['failureSummary']}"
            for fault in found["violations"]
            if fault["impact"] in ("moderate", "serious", "critical")
            for node in fault["nodes"][:1]
        ]

    def close(self) -> None:
        """Close its windows."""
        self.context.close()
