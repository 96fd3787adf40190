"""The page in a real browser: what it asks, what it shows, and what hostile texts cannot do."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright", reason="the page is tested with playwright, which is missing")

from playwright.sync_api import Browser, Locator, expect

from service.http.pages import FOLDER, SECURITY_HEADERS
from service.schemas.queries import QueryRequest
from tests.page.page_driver import PageDriver, chromium
from tests.page.page_server import (
    BIG_SEED,
    CAUTION,
    HOSTILE_TEXTS,
    LAYERS,
    NOTE,
    PLAIN_TEXTS,
    SUGGESTED,
    UNTRACED,
    CannedService,
    canned_answer,
    serving,
)

MINUS = "\u2212"
ASKED = ("The capital of Nepal is", "Kabul")

Open = Callable[..., PageDriver]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def service() -> CannedService:
    return CannedService()


@pytest.fixture(scope="module")
def url(service: CannedService) -> Iterator[str]:
    with serving(service.app()) as address:
        yield address


@pytest.fixture
def open_page(browser: Browser, service: CannedService, url: str) -> Iterator[Open]:
    """Opens pages, and sees at the end that nothing untoward happened on any."""
    service.asked.clear()
    service.gate.clear()
    service.hung_up.clear()
    drivers: list[PageDriver] = []

    def opened(**options: Any) -> PageDriver:
        drivers.append(PageDriver(browser, url, **options))
        return drivers[-1]

    yield opened
    service.gate.set()
    complaints = [complaint for driver in drivers for complaint in driver.complaints]
    for driver in drivers:
        driver.close()
    assert complaints == []


def test_every_file_of_the_page_has_the_security_headers(url: str) -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    paths = ["", *(f"page/{path.relative_to(FOLDER).as_posix()}" for path in files)]
    assert len(paths) > 10
    for path in paths:
        response = httpx.get(url + path)
        assert response.status_code == 200, path
        for name, value in SECURITY_HEADERS.items():
            assert response.headers[name] == value, path
        if path.endswith(".js"):
            assert "javascript" in response.headers["Content-Type"]
    assert httpx.head(url).headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize("path", ["page/no.js", "page/..%2f..%2fsettings.py", "page/../pages.py"])
def test_nothing_else_is_served(url: str, path: str) -> None:
    assert httpx.get(url + path).status_code == 404


def test_markup_and_modules_put_no_corpus_text_into_html() -> None:
    sources = [*FOLDER.glob("*.js"), FOLDER / "index.html"]
    for path in sources:
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacent|x-html|\beval\b|style=\"", path.read_text()
        )
        allowed = [text for text in found if text == 'style="']
        assert len(found) == len(allowed), path
        assert len(allowed) == path.read_text().count('x-bind:style="'), path
        assert len(path.read_text().splitlines()) < 450


def test_every_vendored_library_is_named_with_its_licence() -> None:
    for folder in (FOLDER / "vendor", Path(__file__).parent / "vendor"):
        listed = (folder / "VENDORED.md").read_text()
        for path in folder.iterdir():
            assert path.name == "VENDORED.md" or f"`{path.name}`" in listed, path


def test_a_question_is_answered(open_page: Open, service: CannedService) -> None:
    driver = open_page()
    driver.ask(*ASKED)
    expect(driver.shown("measurement")).to_contain_text("The capital of Nepal is Kabul")
    expect(driver.shown("measurement")).to_contain_text(f"log p = {MINUS}3.3 nats over 3 tokens")
    expect(driver.shown("stage")).to_have_text("Done: 6 training examples found.")
    cards = driver.shown("certificate")
    for card, status in zip(cards.all(), ("certified", "not certified", "refused"), strict=True):
        expect(card.locator(".status")).to_contain_text(status)
    expect(cards.first).to_contain_text("at least 9 of the 10 highest-scoring training examples")
    expect(cards.first.get_by_role("img")).to_have_attribute(
        "aria-label", "Recall is at least 90%; asked for: 90%"
    )
    cards.first.locator("summary").click()
    for text in ("the random draw of the sketch", "its noise is normal", "0.9821", "8,072"):
        expect(cards.first).to_contain_text(text)
    first = driver.shown("result").first
    expect(first).to_contain_text("+12,523")
    expect(first).to_contain_text("+119 normalised")
    expect(first).to_contain_text("Country 1: Capital")
    expect(first).to_contain_text("year 1991")
    assert driver.texts()[0] == PLAIN_TEXTS[0]
    expect(driver.shown("share")).to_contain_text("carry 31% of all positive influence (24% to 39%")
    expect(driver.page.locator(".tools")).to_contain_text(
        f"32 of 8,072 rows rescored and 128 sampled, in 0.93 s; index “default”, estimator ekfac "
        f"(damping 0.1), ranked by normalised score, seed {BIG_SEED}."
    )
    assert len(service.asked) == 1


def test_an_answer_that_is_not_certified_says_what_it_takes(open_page: Open) -> None:
    driver = open_page()
    driver.open_options()
    driver.page.fill("[name=deadline]", "2")
    driver.ask("The capital of Nepal is")
    expect(driver.page.locator(".tools")).to_contain_text(
        "Certifying it takes about 2,300 more rows, 4.20 s."
    )


def test_what_is_asked_by_default_is_what_the_service_takes_by_default(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.ask("The capital of Nepal is")
    asked = QueryRequest.model_validate_json(json.dumps(service.asked[0]))
    explained = {"tokens": True, "layers": True, "clusters": True}
    assert asked == QueryRequest(prompt="The capital of Nepal is", **explained)


def test_every_option_is_sent(open_page: Open, service: CannedService) -> None:
    driver = open_page()
    page = driver.page
    driver.open_options()
    for name, value in (("direction", "opponents"), ("ranking", "score"), ("index", "<b>b</b>")):
        page.select_option(f"[name={name}]", value)
    page.select_option("[name=until]", "calibration")
    page.select_option("[name=estimator]", "identity")
    expect(page.locator("[name=parameter]")).to_have_count(0)
    page.select_option("[name=estimator]", "")
    page.get_by_label("Damping").fill("0.5")
    page.get_by_label("Block size").fill("32")
    page.select_option("[name=index]", "default")
    page.select_option("[name=estimator]", "kfac")
    wanted = {"k": 3, "recall": 0.8, "confidence": 0.99, "budget": 64, "deadline": 2.5}
    for name, number in {**wanted, "seed": BIG_SEED}.items():
        page.fill(f"[name={name}]", str(number))
    for name in ("tokens", "layers", "clusters"):
        page.uncheck(f"[name={name}]")
    page.check("[name=documents]")
    page.fill("[name=completion]", "Kabul")
    page.uncheck("[name=space]")
    filters = [
        ("year", "any_of", '1991\n"1992"\ntrue'),
        ("year", "at_most", "1995"),
        ("__proto__", "at_least", "2020-01-01"),
    ]
    for place, (column, kind, value) in enumerate(filters):
        page.click("text=Add a filter")
        page.locator("[name=column]").nth(place).fill(column)
        page.locator("[name=kind]").nth(place).select_option(kind)
        page.locator("[name=value]").nth(place).fill(value)
    driver.ask(*ASKED)
    assert service.asked == [
        {
            **wanted,
            "prompt": ASKED[0],
            "completion": ASKED[1],
            "index": "default",
            "estimator": "kfac",
            "parameters": {"damping": 0.5, "block_size": 32},
            "direction": "opponents",
            "ranking": "score",
            "until": "calibration",
            "seed": BIG_SEED,
            "tokens": False,
            "layers": False,
            "clusters": False,
            "documents": True,
            "filters": {
                "year": {"any_of": [1991, "1992", True], "at_most": 1995},
                "__proto__": {"at_least": "2020-01-01"},
            },
        }
    ]
    expect(driver.shown("partial")).to_contain_text("Partial answer")
    expect(driver.shown("documents")).to_contain_text("not scored")


def options_of(driver: PageDriver) -> list[tuple[str, str | None]]:
    """The estimators to choose from, and why one cannot be."""
    expect(driver.page.locator("[name=estimator] option")).to_have_count(5)
    return [
        (option.inner_text(), option.get_attribute("title"))
        for option in driver.page.locator("[name=estimator] option").all()
    ]


def test_the_estimators_are_those_of_the_chosen_index(open_page: Open) -> None:
    driver = open_page()
    driver.open_options()
    named = ["the index's own: ekfac", "bm25", "identity", "kfac", "run"]
    assert options_of(driver) == [(name, None) for name in named]
    damping = driver.page.get_by_label("Damping")
    for name, value in (
        ("placeholder", "0.1"),
        ("min", "0.000001"),
        ("max", "1000000"),
        ("title", "Of ekfac, a damping."),
    ):
        expect(damping).to_have_attribute(name, value)
    expect(driver.shown("estimator-note")).to_contain_text("<b>curvature</b>")
    driver.page.select_option("[name=index]", "<b>b</b>")
    expect(damping).to_have_attribute("placeholder", "0.2")
    lacking = "The index has no <b>factors</b>⟨RLO⟩ of EK-FAC; build it with them."
    named = ["the index's own: kfac", "bm25", "ekfac", "identity", "run"]
    reasons = [lacking if name == "ekfac" else None for name in named]
    assert options_of(driver) == list(zip(named, reasons, strict=True))
    expect(driver.page.locator("[name=estimator] option[value=ekfac]")).to_be_disabled()


def test_a_chosen_estimator_and_its_parameters_outlive_a_change_of_index(open_page: Open) -> None:
    driver = open_page()
    page = driver.page
    driver.open_options()
    page.select_option("[name=estimator]", "kfac")
    page.get_by_label("Damping").fill("0.5")
    page.get_by_label("Block size").fill("8")
    page.select_option("[name=index]", "<b>b</b>")
    expect(page.locator("[name=estimator]")).to_have_value("kfac")
    expect(page.get_by_label("Damping")).to_have_value("0.5")
    page.select_option("[name=estimator]", "bm25")
    expect(page.locator("[name=parameter]")).to_have_count(0)
    page.select_option("[name=index]", "default")
    page.select_option("[name=estimator]", "")
    expect(page.get_by_label("Damping")).to_have_value("0.5")
    expect(page.get_by_label("Block size")).to_have_count(0)
    driver.open("#prompt=x&index=%3Cb%3Eb%3C%2Fb%3E&estimator=ekfac")
    expect(page.locator("[name=estimator]")).to_have_value("ekfac")
    expect(driver.shown("estimator-note")).to_contain_text("Not for this index: The index has no")


def test_an_estimator_without_gradients_is_asked_and_shown_without_their_parts(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.open_options()
    driver.page.get_by_label("Damping").fill("0.5")
    driver.page.check("[name=documents]")
    driver.page.select_option("[name=estimator]", "bm25")
    for name in ("tokens", "layers", "ranking"):
        expect(driver.page.locator(f"[name={name}]")).to_be_disabled()
    driver.ask(*ASKED)
    (asked,) = service.asked
    assert asked["estimator"] == "bm25"
    assert not {"tokens", "layers", "parameters"} & set(asked)
    expect(driver.page.locator(".tools")).to_contain_text("estimator bm25, ranked")
    assert "normalised" not in driver.shown("result").first.inner_text()
    expect(driver.page.locator(".unit")).to_contain_text("without unit")
    assert '"document","score","normalised_score"' in driver.download("Download CSV")


@pytest.mark.parametrize("estimator", ["", "kfac"])
def test_without_the_list_of_estimators_a_question_is_answered(
    open_page: Open, service: CannedService, estimator: str
) -> None:
    driver = open_page()
    driver.context.route("**/v1/estimators", lambda route: route.abort())
    driver.open(f"#prompt=x&completion=y&estimator={estimator}&parameter=damping%3D0.5")
    driver.open_options()
    options = driver.page.locator("[name=estimator] option")
    expect(options).to_have_text(["the index's own", *([estimator] if estimator else [])])
    expect(driver.page.get_by_label("Damping")).to_have_value("0.5")
    driver.page.click("text=Ask")
    driver.wait_for_answer()
    assert service.asked[0].get("estimator", "") == estimator
    assert service.asked[0]["parameters"] == {"damping": 0.5}
    driver.complaints.clear()


def test_a_number_out_of_bounds_is_shown_where_it_is(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.open("#prompt=x&completion=y&parameter=damping%3D-1")
    expect(driver.page.get_by_label("Damping")).to_have_value("-1")
    driver.page.click("text=Ask")
    expect(driver.page.get_by_label("Damping")).to_be_focused()
    assert service.asked == []


def test_results_and_their_bound_appear_before_the_answer_ends(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.fill("gated", "Kabul")
    driver.page.click("text=Ask")
    expect(driver.shown("provisional")).to_be_visible()
    expect(driver.shown("result")).to_have_count(3)
    expect(driver.shown("stage")).to_contain_text("48 rows rescored and 64 sampled so far")
    expect(driver.shown("tightening")).to_contain_text("Recall is at least 90% so far")
    expect(driver.page.locator("#results")).to_have_attribute("aria-busy", "true")
    assert driver.shown("certificate").count() == 0
    service.gate.set()
    driver.wait_for_answer()
    expect(driver.shown("provisional")).to_be_hidden()
    expect(driver.page.locator("#results")).to_have_attribute("aria-busy", "false")


def test_a_contrast_sends_what_was_not_said(open_page: Open, service: CannedService) -> None:
    driver = open_page()
    driver.ask(*ASKED, against="Kathmandu")
    assert service.asked[0]["against"] == " Kathmandu"
    measured = driver.shown("measurement")
    expect(measured).to_contain_text(f"against “Kathmandu”, log p = {MINUS}7.5 nats")
    expect(measured).to_contain_text("The measured difference is +4.2 nats.")


def test_a_caution_is_shown_and_a_prompt_may_be_empty(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.ask(*ASKED)
    expect(driver.shown("measurement").locator(".warning")).to_be_hidden()
    driver.ask("", ASKED[1])
    assert service.asked[-1]["prompt"] == ""
    expect(driver.shown("measurement").locator(".warning")).to_have_text(CAUTION)


def test_both_directions_are_apart(open_page: Open) -> None:
    driver = open_page()
    driver.page.select_option("[name=direction]", "both")
    driver.ask(*ASKED)
    opponents = driver.page.get_by_role("region", name="Opponents")
    expect(opponents).to_contain_text(f"{MINUS}12,523")
    expect(driver.page.get_by_role("region", name="Proponents")).not_to_contain_text(
        f"{MINUS}12,523"
    )
    assert driver.shown("certificate").count() == 6
    expect(driver.shown("certificate").nth(3)).to_contain_text("opponents")


def test_near_duplicates_are_folded_under_the_best_of_them(open_page: Open) -> None:
    driver = open_page()
    driver.ask(*ASKED)
    assert PLAIN_TEXTS[2] not in driver.texts()
    folded = driver.shown("duplicates")
    expect(folded).to_have_count(1)
    folded.locator("summary").click()
    expect(folded.locator(".text")).to_have_text(PLAIN_TEXTS[2])
    expect(folded).to_contain_text("facts/3#<b>proponents</b>")


def test_tokens_are_coloured_and_titled_and_listed(open_page: Open) -> None:
    driver = open_page()
    driver.ask(*ASKED)
    first = driver.shown("result").first
    tokens = first.get_by_test_id("text").locator(".token")
    answer = canned_answer(QueryRequest(prompt="x", tokens=True))
    wanted = answer.results[0].tokens
    assert wanted is not None
    assert "".join(tokens.all_inner_texts()) == answer.results[0].text
    for token, span in zip(wanted, tokens.all(), strict=True):
        title = span.get_attribute("title") or ""
        assert re.search(rf"\n[+{MINUS}][\d,.]+$|\n0$", title), title
        assert ("lowered" in (span.get_attribute("class") or "")) == (token.score < 0)
    strongest = max(range(len(wanted)), key=lambda i: abs(wanted[i].score))
    strengths = [s.evaluate("e => e.style.getPropertyValue('--strength')") for s in tokens.all()]
    assert strengths[strongest] == "100%"
    backgrounds = {s.evaluate("e => getComputedStyle(e).backgroundColor") for s in tokens.all()}
    assert len(backgrounds) > 3
    expect(driver.shown("legend")).to_be_visible()
    first.get_by_text("Details").click()
    rows = first.get_by_role("table", name="Strongest tokens").get_by_role("row")
    expect(rows).to_have_count(sum(token.score != 0 for token in wanted))


def test_two_estimators_are_compared(open_page: Open, service: CannedService) -> None:
    driver = open_page()
    driver.open_options()
    driver.page.select_option("[name=compare]", "run")
    driver.ask(*ASKED)
    comparison = driver.shown("comparison")
    expect(comparison.get_by_role("heading")).to_have_text("ekfac beside run")
    expect(comparison).to_contain_text("5 of 6 examples are among the best of both.")
    rows = [row.all_inner_texts() for row in rows_of(comparison)]
    shown = [[cell.strip() for cell in row[0].split("\t")] for row in rows]
    first = PLAIN_TEXTS[0]
    assert shown[0] == ["Example", "Rank, ekfac", "Rank, run", "Score, ekfac", "Score, run"]
    assert shown[1] == ["Among the best of both: 5"]
    assert shown[2] == [first, "1", "1", "+12,523", "+12,523"]
    assert shown[7] == ["Only ekfac: 1"]
    assert shown[8] == [PLAIN_TEXTS[1], "2", "\u2013", "+4,428", "\u2013"]
    expect(comparison).to_contain_text(NOTE)
    expect(comparison).to_contain_text("in nats of the measured value to first order")
    assert [asked.get("estimator") for asked in service.asked] == [None, "run"]
    assert not {"tokens", "layers"} & set(service.asked[1])
    driver.page.select_option("[name=compare]", "")
    driver.ask(*ASKED)
    expect(comparison).to_have_count(0)


def rows_of(section: Locator) -> list[Locator]:
    return section.get_by_role("row").all()


def test_a_comparison_that_is_refused_says_why_beside_the_answer(open_page: Open) -> None:
    driver = open_page()
    driver.open_options()
    driver.page.select_option("[name=compare]", "run")
    driver.ask("untraced", "Kabul")
    comparison = driver.shown("comparison")
    expect(comparison).to_contain_text("No comparison with run: The question was not traced")
    expect(comparison).to_contain_text(UNTRACED)
    assert len(driver.texts()) > 1
    assert driver.accessibility_faults() == []


def test_an_untraced_question_is_refused_readably(open_page: Open) -> None:
    driver = open_page()
    driver.open_options()
    driver.page.select_option("[name=estimator]", "run")
    driver.fill("untraced", "Kabul")
    driver.page.click("button:has-text('Ask')")
    expect(driver.shown("problem")).to_contain_text("The question was not traced")
    expect(driver.shown("problem")).to_contain_text(UNTRACED)


@pytest.mark.parametrize("field", ["estimator", "compare"])
def test_an_untraced_question_is_traced_as_a_job(
    field: str, open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.open_options()
    driver.page.select_option(f"[name={field}]", "run")
    driver.fill("untraced", f"asked by {field}")
    driver.page.click("button:has-text('Ask')")
    button = driver.page.get_by_role("button", name="Trace it as a job")
    expect(button).to_be_visible()
    assert driver.accessibility_faults() == []
    button.click()
    expect(driver.shown("stage")).to_contain_text("goes on, whether you wait or not")
    expect(button).to_be_hidden()
    (asked,) = service.jobs[-1]
    assert (asked.prompt, asked.estimator) == ("untraced", "run")
    driver.wait_for_answer()
    if field == "compare":
        expect(driver.shown("comparison")).to_contain_text("among the best of both")
    assert not driver.complaints


def test_a_question_that_cannot_be_traced_says_why(open_page: Open) -> None:
    driver = open_page()
    driver.open_options()
    driver.page.select_option("[name=estimator]", "run")
    driver.fill("untraced", "gone")
    driver.page.click("button:has-text('Ask')")
    driver.page.get_by_role("button", name="Trace it as a job").click()
    expect(driver.shown("problem")).to_contain_text("The recorded run cannot be used")
    expect(driver.shown("problem")).to_contain_text("<b>It is gone.</b>")
    expect(driver.page.get_by_role("button", name="Trace it as a job")).to_be_hidden()


def test_notes_of_an_answer_are_shown(open_page: Open) -> None:
    driver = open_page()
    driver.open_options()
    driver.page.select_option("[name=estimator]", "run")
    driver.ask(*ASKED)
    expect(driver.shown("note")).to_have_text(NOTE)
    expect(driver.page.locator(".unit").last).to_contain_text("Leaving the example out of the run")


def test_a_link_says_what_to_compare_with(open_page: Open, service: CannedService) -> None:
    driver = open_page()
    driver.open("#prompt=hostile&completion=x&compare=run")
    assert driver.page.locator("[name=compare]").input_value() == "run"
    driver.page.click("button:has-text('Ask')")
    expect(driver.shown("comparison")).to_contain_text("<script>window.hacked=1</script>")
    assert driver.page.evaluate("window.hacked") is None
    assert driver.accessibility_faults() == []


def test_layers_are_plotted_and_tabled(open_page: Open) -> None:
    driver = open_page()
    driver.ask(*ASKED)
    layers = driver.shown("layers")
    picture = "canvas => canvas.toDataURL()"
    by_sign = layers.locator("canvas").evaluate(picture)
    assert len(by_sign) > 5000
    layers.locator("summary").click()
    rows = layers.get_by_role("row").all()[1:]
    answer = canned_answer(QueryRequest(prompt="x", layers=True))
    for name, row in zip(LAYERS, rows, strict=True):
        total = sum((result.layers or {})[name] for result in answer.results)
        cells = row.inner_text().split("\t")
        assert cells[0] == name
        shown = float(cells[3].replace(MINUS, "-").replace(",", "").replace("+", ""))
        assert shown == pytest.approx(total, rel=1e-3)
    layers.get_by_label("add up sizes").check()
    assert layers.locator("canvas").evaluate(picture) != by_sign


def test_hostile_texts_are_shown_and_do_nothing(open_page: Open) -> None:
    driver = open_page()
    driver.page.select_option("[name=direction]", "both")
    driver.ask("hostile", "<img src=x onerror=window.hacked=8>", "</q><script>hacked=9</script>")
    driver.page.wait_for_timeout(200)
    driver.page.locator("details").evaluate_all("all => all.forEach(one => (one.open = true))")
    for result in driver.shown("result").all():
        result.locator(".text").first.hover()
    assert driver.page.evaluate("typeof window.hacked") == "undefined"
    results = driver.page.locator("#results")
    assert results.locator("script, img, svg, a, h1, b > b, i").count() == 0
    texts = driver.texts()
    for wanted in (HOSTILE_TEXTS[0], HOSTILE_TEXTS[1], HOSTILE_TEXTS[3]):
        assert wanted in texts
    shown = next(text for text in texts if "gnitrevni" in text)
    for symbol in ("⟨RLO⟩", "⟨PDF⟩", "⟨ZWSP⟩", "␛[31m", "⟨U+E0041⟩", "␀"):
        assert symbol in shown
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x1b\x00]", results.inner_text())


def test_the_policy_stops_what_markup_would_do_and_is_heard(open_page: Open) -> None:
    driver = open_page()
    driver.page.evaluate(
        """() => {
          const script = document.createElement('script')
          script.textContent = 'window.hacked = 1'
          const frame = document.createElement('div')
          frame.innerHTML = '<img src="http://evil.example/x.png" onerror="window.hacked = 2">'
          document.body.append(script, frame)
        }"""
    )
    driver.page.wait_for_timeout(200)
    assert driver.page.evaluate("typeof window.hacked") == "undefined"
    for part in ("script-src", "img-src", "asked http://evil.example"):
        assert any(part in complaint for complaint in driver.complaints)
    driver.complaints.clear()


def test_long_texts_are_cut_until_asked_for(open_page: Open) -> None:
    driver = open_page()
    driver.ask("hostile", "x")
    last = driver.shown("result").last
    text, button = last.get_by_test_id("text"), last.get_by_role("button")
    assert text.evaluate("e => e.clientHeight") < 200
    assert len(text.text_content() or "") == 2000  # the canned tokens end there
    button.click()
    expect(button).to_have_text("Show less")
    assert text.evaluate("e => e.clientHeight") > 250
    button.click()
    assert text.evaluate("e => e.clientHeight") < 200


def test_cancelling_hangs_up_and_keeps_what_was_found(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.fill("gated", "Kabul")
    driver.page.click("text=Ask")
    expect(driver.shown("result")).to_have_count(3)
    driver.page.get_by_role("button", name="Cancel").click()
    assert service.hung_up.wait(5)
    expect(driver.shown("stage")).to_have_text("Cancelled.")
    expect(driver.shown("result")).to_have_count(3)
    expect(driver.shown("provisional")).to_contain_text("the search had not ended")
    expect(driver.page.get_by_role("button", name="Ask")).to_be_focused()
    driver.ask(*ASKED)


@pytest.mark.parametrize(
    ("prompt", "title", "detail"),
    [
        ("broken", "Not enough memory for this query", "Ask for fewer."),
        ("cut", "The connection ended early", "ask again"),
    ],
)
def test_a_failure_within_the_stream_is_told(
    open_page: Open, prompt: str, title: str, detail: str
) -> None:
    driver = open_page()
    driver.fill(prompt, "Kabul")
    driver.page.click("text=Ask")
    expect(driver.shown("problem")).to_contain_text(title)
    expect(driver.shown("problem")).to_contain_text(detail)
    assert driver.shown("certificate").count() == 0


def test_a_refusal_is_told_in_its_own_words(open_page: Open) -> None:
    driver = open_page()
    driver.fill("refused", "Kabul")
    driver.page.click("text=Ask")
    expect(driver.shown("problem")).to_contain_text("The query cannot be measured")
    expect(driver.shown("problem")).to_contain_text("It has <b>no</b> token.")
    assert [text for text in driver.complaints if "422" not in text] == []
    driver.complaints.clear()


def test_a_service_that_is_gone_is_told(open_page: Open) -> None:
    driver = open_page()
    driver.context.set_offline(True)
    driver.fill(*ASKED)
    driver.page.click("text=Ask")
    expect(driver.shown("problem")).to_contain_text("The service cannot be reached")
    driver.complaints.clear()


def test_nothing_is_sent_without_prompt_and_completion(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.page.click("text=Ask")
    expect(driver.page.locator("[name=prompt]")).to_be_focused()
    assert service.asked == []


def test_without_a_completion_the_model_completes_the_prompt(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    driver.ask("The capital of Nepal is")
    assert "completion" not in service.asked[0]
    assert "max_new_tokens" not in service.asked[0]
    expect(driver.shown("measurement")).to_contain_text("the model's own completion")
    driver.open_options()
    driver.page.get_by_label("New tokens").fill("7")
    driver.ask("The capital of Nepal is")
    assert service.asked[1]["max_new_tokens"] == 7
    driver.open("#prompt=x&completion=left&complete=1")  # as links were once
    expect(driver.page.locator("[name=completion]")).to_have_value("")


def test_a_prompt_is_asked_as_a_users_message_where_the_model_chats(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    page = driver.page
    page.check("[name=chat]")
    page.fill("[name=completion]", "Kabul")
    expect(page.locator("[name=space]")).to_be_hidden()  # a template decides on spaces
    driver.ask(*ASKED, against="Lima")
    asked = service.asked[0]
    assert asked["messages"] == [{"role": "user", "content": ASKED[0]}]
    assert "prompt" not in asked
    assert (asked["completion"], asked["against"]) == ("Kabul", "Lima")
    expect(driver.shown("measurement")).to_contain_text(f"<|user|>{ASKED[0]}")
    driver.open(page.evaluate("location.hash"))
    expect(page.locator("[name=chat]")).to_be_checked()
    page.uncheck("[name=chat]")
    driver.open_options()
    page.select_option("[name=index]", "<b>b</b>")
    expect(page.locator("[name=chat]")).to_be_hidden()


def test_beginnings_of_examples_are_offered_and_asked_by_two_clicks(
    open_page: Open, service: CannedService
) -> None:
    driver = open_page()
    offered = driver.shown("suggestions").get_by_role("button")
    expect(offered).to_have_count(len(SUGGESTED))
    assert offered.nth(1).inner_text() == "The <b>highest</b> point\u21b5\u27e8RLO\u27e9of"
    offered.nth(1).click()
    expect(driver.page.locator("[name=prompt]")).to_have_value(SUGGESTED[1])
    expect(driver.shown("suggestions")).to_be_hidden()
    driver.page.keyboard.press("Enter")  # the focus is where it asks
    driver.wait_for_answer()
    assert service.asked[0]["prompt"] == SUGGESTED[1]
    assert "completion" not in service.asked[0]
    driver.open()
    driver.open_options()
    driver.page.select_option("[name=index]", "<b>b</b>")
    expect(driver.shown("suggestions")).to_be_hidden()


def test_numbers_say_in_a_line_what_they_mean(open_page: Open) -> None:
    driver = open_page()
    driver.ask(*ASKED)
    meaning = driver.shown("meaning")
    expect(meaning).to_contain_text("nats of effect come only through a measured scale")
    expect(meaning).to_contain_text("Normalised: per norm of the example\u2019s gradient.")
    expect(driver.shown("measurement")).to_contain_text("0 nats is certain")
    expect(driver.shown("certificates")).to_contain_text("how much of the true top")
    driver.open_options()
    driver.page.select_option("[name=estimator]", "run")
    driver.ask(*ASKED)
    expect(meaning).to_contain_text("in nats of the measured value to first order")
    assert "Normalised" not in meaning.inner_text()


@pytest.mark.parametrize("estimator", ["", "identity"])
def test_a_link_holds_all_inputs_and_sends_nothing_by_itself(
    open_page: Open, service: CannedService, estimator: str
) -> None:
    driver = open_page()
    page = driver.page
    driver.open_options()
    page.select_option("[name=direction]", "both")
    page.select_option("[name=index]", "<b>b</b>")
    page.get_by_label("Damping").fill("0.5")
    page.select_option("[name=estimator]", estimator)
    page.fill("[name=k]", "4")
    page.fill("[name=seed]", str(BIG_SEED))
    page.uncheck("[name=tokens]")
    page.click("text=Add a filter")
    page.fill("[name=column]", "a&b=c#")
    page.fill("[name=value]", 'x\n"y"')
    driver.ask("What & why #1? ü\n%", "Kabul", "Kathmandu")
    fragment = page.evaluate("location.hash")
    driver.open(fragment)
    expect(driver.shown("notice")).to_contain_text("Nothing was sent yet")
    expect(page.locator("[name=estimator]")).to_have_value(estimator)
    page.wait_for_timeout(200)
    assert len(service.asked) == 1
    page.click("text=Ask")
    driver.wait_for_answer()
    assert service.asked[1] == service.asked[0]
    assert service.asked[0]["filters"] == {"a&b=c#": {"any_of": ["x", "y"]}}
    assert ("parameters" in service.asked[0]) == (estimator == "")
    driver.open_options()
    page.select_option("[name=estimator]", "")
    expect(page.get_by_label("Damping")).to_have_value("0.5")


def test_a_spoilt_link_fills_what_it_can(open_page: Open, service: CannedService) -> None:
    driver = open_page()
    parameters = "parameter=damping&parameter=__proto__%3D1&parameter=damping%3Dx&estimator=none"
    filters = "filter=%5B1%5D&filter=nonsense&filter=%5B%22a%22%2C%22steal%22%2C%22b%22%5D"
    driver.open(
        f"#prompt=x&direction=sideways&k=many&filters=1&parameters=1&{parameters}&{filters}&complete=1"
    )
    expect(driver.page.locator("[name=prompt]")).to_have_value("x")
    expect(driver.page.locator("[name=direction]")).to_have_value("proponents")
    expect(driver.page.locator("[name=k]")).to_have_value("10")
    assert driver.page.locator(".filter").count() == 0
    expect(driver.page.locator("[name=estimator]")).to_have_value("none")
    assert driver.page.locator("[name=parameter]").count() == 0
    assert service.asked == []


def test_a_measured_scale_is_shown_beside_its_results(open_page: Open) -> None:
    driver = open_page()
    driver.ask(*ASKED)
    expect(driver.shown("removal").first).to_be_hidden()
    expect(driver.page.locator(".unit")).to_contain_text("was not measured")
    assert '"effect_of_removal"' in driver.download("Download CSV")
    driver.ask("measured", "Kabul")
    first = driver.shown("removal").first
    expect(first).to_contain_text("nats")
    expect(first).to_contain_text("at 90% confidence), to first order")
    expect(driver.shown("share").first).to_contain_text("all 6 results")
    expect(driver.page.locator(".unit")).to_contain_text("one row at a time")
    rows = list(csv.DictReader(io.StringIO(driver.download("Download CSV"), newline="")))
    for row in rows:
        assert float(row["effect_of_removal"]) == pytest.approx(-2e-5 * float(row["score"]))
        assert row["effect_confidence"] == "0.9"


def test_downloads_are_the_answer(open_page: Open, service: CannedService) -> None:
    driver = open_page()
    driver.ask("hostile", "Kabul")
    request = QueryRequest.model_validate_json(json.dumps(service.asked[0]))
    answer = canned_answer(request)
    assert driver.download("Download JSON") == answer.model_dump_json()
    table = driver.download("Download CSV")
    rows = list(csv.DictReader(io.StringIO(table, newline="")))
    assert len(rows) == len(answer.results)
    for row, result in zip(rows, answer.results, strict=True):
        assert float(row["score"]) == result.score
        assert row["id"] == result.id
        assert json.loads(row["metadata"]) == result.metadata
        assert row["text"].removeprefix("'") == result.text
        assert row["text"][0] not in "=+-@"
    assert any(row["text"].startswith("'=HYPERLINK") for row in rows)


def test_csv_cells_that_look_like_formulas_are_guarded(open_page: Open) -> None:
    driver = open_page()
    wanted = {
        "=1+1": '"\'=1+1"',
        "+a": '"\'+a"',
        "-a": '"\'-a"',
        "@a": '"\'@a"',
        "--1": '"\'--1"',
        "\t=1": '"\'\t=1"',
        "\uff1d1": '"\'\uff1d1"',
        "-5": '"-5"',
        "+1.5e-3": '"+1.5e-3"',
        'a"b': '"a""b"',
        -2.5: '"-2.5"',
        None: '""',
    }
    cells = driver.page.evaluate(
        "async texts => texts.map((await import('/page/download.js')).cell)",
        list(wanted),
    )
    assert cells == list(wanted.values())


def test_the_keyboard_is_enough(open_page: Open, service: CannedService) -> None:
    driver = open_page()
    keys = driver.page.keyboard
    keys.press("Tab")
    expect(driver.page.get_by_text("Skip to the results")).to_be_focused()
    keys.press("Tab")
    keys.type("gated")
    keys.press("Tab")
    keys.type("Kabul")
    keys.press("Control+Enter")
    expect(driver.shown("result")).to_have_count(3)
    keys.press("Escape")
    expect(driver.shown("stage")).to_have_text("Cancelled.")
    service.gate.set()
    keys.press("Control+Enter")
    driver.wait_for_answer()
    assert service.asked[1]["completion"] == " Kabul"
    for _ in range(40):
        keys.press("Tab")
        focused = "document.activeElement.closest('.folded')"
        if driver.page.evaluate(f"{focused} !== null"):
            break
    keys.press("Enter")
    expect(driver.shown("duplicates").locator(".text")).to_be_visible()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert driver.page.evaluate(outline) != "none"


def test_the_skip_link_leads_to_the_results(open_page: Open) -> None:
    driver = open_page()
    driver.page.keyboard.press("Tab")
    driver.page.keyboard.press("Enter")
    expect(driver.page.locator("#results")).to_be_focused()


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_width_scrolls_sideways(open_page: Open, width: int) -> None:
    driver = open_page(viewport={"width": width, "height": 800})
    driver.open_options()
    driver.page.check("[name=documents]")
    driver.page.select_option("[name=estimator]", "kfac")
    driver.page.click("text=Add a filter")
    driver.page.locator(".filter button").click()
    driver.page.select_option("[name=direction]", "both")
    driver.ask("hostile", "W" * 300)
    driver.page.locator("details").evaluate_all("all => all.forEach(one => (one.open = true))")
    assert driver.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_no_fault(open_page: Open, width: int) -> None:
    """In light and in dark; of what only colours decide, the rules that read them."""
    driver = open_page(color_scheme="light", viewport={"width": width, "height": 900})

    def faults() -> list[str]:
        driver.page.emulate_media(color_scheme="light")
        found = driver.accessibility_faults()
        driver.page.emulate_media(color_scheme="dark")
        return found + driver.accessibility_faults("color-contrast", "link-in-text-block")

    assert faults() == []
    driver.open_options()
    driver.page.check("[name=documents]")
    driver.page.fill("[name=deadline]", "5")
    driver.page.select_option("[name=direction]", "both")
    driver.ask(*ASKED, against="Kathmandu")
    driver.page.locator("details").evaluate_all("all => all.forEach(one => (one.open = true))")
    assert faults() == []
    driver.page.select_option("[name=estimator]", "bm25")
    assert faults() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_strongest_tokens_can_be_read(open_page: Open, scheme: str) -> None:
    driver = open_page(color_scheme=scheme)
    driver.ask(*ASKED)
    contrast = """token => {
      const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
      const luminance = colours => {
        for (const colour of colours) {
          context.fillStyle = colour
          context.fillRect(0, 0, 1, 1)
        }
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
      }
      const style = getComputedStyle(token)
      const behind = getComputedStyle(token.closest('.card')).backgroundColor
      const [low, high] = [luminance([behind, style.backgroundColor]), luminance([style.color])]
        .sort((a, b) => a - b)
      return (high + 0.05) / (low + 0.05)
    }"""
    for side in ("raised", "lowered"):
        driver.page.locator(f".token.{side}").first.evaluate(
            "token => token.style.setProperty('--strength', '100%')"
        )
        assert driver.page.locator(f".token.{side}").first.evaluate(contrast) >= 4.5
