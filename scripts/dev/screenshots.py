"""Pictures of the page for the README, from a running service."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from scripts.console import one_sentence_errors, print_json

FOLDER = Path(__file__).parents[2] / "docs" / "images"
ANSWER_MS = 60_000

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    prompt: Annotated[str, typer.Argument(help="To ask.")] = "The capital of Nepal is",
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = FOLDER,
) -> None:
    """Ask in a headless Chromium, and write page.png, page-dark.png and page-narrow.png.

    Needs the extra `dev` and a chromium on the PATH.

    Example: python -m scripts.dev.screenshots "The capital of Nepal is"
    """
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        raise ValueError("There is no chromium on the PATH; install it to open the page with.")
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    written = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
        )
        for name, width, scheme in (
            ("page", 1100, "light"),
            ("page-dark", 1100, "dark"),
            ("page-narrow", 360, "light"),
        ):
            page = browser.new_page(
                viewport={"width": width, "height": 1400},
                color_scheme="dark" if scheme == "dark" else "light",
                reduced_motion="reduce",
            )
            page.goto(url)
            page.locator("[name=index] option").first.wait_for(state="attached")
            page.fill("[name=prompt]", prompt)
            page.click("button:has-text('Ask')")
            page.get_by_test_id("certificate").first.wait_for(timeout=ANSWER_MS)
            page.wait_for_timeout(1000)  # the plot is drawn
            page.screenshot(path=out / f"{name}.png")
            written.append(str(out / f"{name}.png"))
        browser.close()
    print_json({"written": written})


if __name__ == "__main__":
    app()
