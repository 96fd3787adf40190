"""The page in a browser, on the real service."""

from collections.abc import Iterator

import pytest

from service.http.app import create_app
from service.settings import Settings
from tests.page.page_server import serving
from tests.service_fixtures import Workspace

page_driver = pytest.importorskip("tests.page.page_driver", reason="needs playwright")


@pytest.fixture(scope="module")
def driver(workspace: Workspace) -> Iterator["page_driver.PageDriver"]:
    settings = Settings(model=str(workspace.model), indexes={"default": workspace.index})
    with serving(create_app(settings)) as url, page_driver.chromium() as browser:
        yield page_driver.PageDriver(browser, url)


def test_a_question_and_its_contrast(driver: "page_driver.PageDriver") -> None:
    driver.ask("The capital of France is", "Paris")
    shown = " ".join(driver.texts())
    assert "The capital of France is Paris." in shown
    assert driver.complaints == []
    driver.ask("The capital of France is", "Paris", against="Lima")
    assert "The capital of France is Paris." in " ".join(driver.texts())
    assert driver.complaints == []


def test_an_estimator_and_its_damping_are_chosen(driver: "page_driver.PageDriver") -> None:
    driver.open_options()
    used = driver.page.locator(".tools")
    for estimator, text in (("kfac", "kfac (damping 0.5)"), ("bm25", "bm25, ranked by score")):
        driver.page.get_by_label("Damping").fill("0.5")
        driver.page.select_option("[name=estimator]", estimator)
        driver.ask("The capital of France is", "Paris")
        assert f"estimator {text}" in used.inner_text()
        assert driver.texts()[0] == "The capital of France is Paris."
        driver.page.select_option("[name=estimator]", "")
    assert driver.complaints == []


def test_a_hostile_example_is_shown_harmless(driver: "page_driver.PageDriver") -> None:
    driver.ask("The capital of [bold]France[/bold] is", "[/nonsense]")
    (hostile,) = [text for text in driver.texts() if "[/nonsense]" in text]
    assert not {"\x1b", "\u202e"} & set(hostile)
    assert driver.complaints == []
