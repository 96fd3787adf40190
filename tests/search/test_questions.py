"""What can be asked: contrasts, weighted batches, opponents, filters; and explanations."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from service.completing import Writing, Written
from service.conversation import Message
from service.errors import UnknownEstimator
from service.models import BadQuery, load_model
from service.scoring.explaining import token_texts
from service.search.answer import Answer
from service.search.asked import caution
from service.search.opening import open_index
from service.search.query import Condition, Query, Term
from service.search.retrieval import Retriever
from tests.service_fixtures import COUNTRIES, END, HOSTILE_ID, Workspace, corpus_rows

COMPLETION = "The capital"
PROMPT = "The capital of France is"
ROWS = len(corpus_rows())
WHOLE: dict[str, Any] = {"k": ROWS, "budget": ROWS, "ranking": "score", "seed": 1}


@pytest.fixture(scope="module")
def retriever(workspace: Workspace) -> Retriever:
    return Retriever(open_index(workspace.index, load_model(str(workspace.model))))


def scores(answer: Answer) -> np.ndarray:
    """By row, of an answer that names every row."""
    found = np.full(ROWS, np.nan)
    for result in answer.results:
        found[result.row] = result.score
    return found


def alone(retriever: Retriever, completion: str) -> np.ndarray:
    return scores(retriever.answer(Query(prompt=PROMPT, completion=completion, **WHOLE)))


def test_an_empty_prompt_asks_after_the_token_that_begins_a_text(retriever):
    query = Query(prompt="", completion=COMPLETION, **WHOLE)
    answer = retriever.answer(query)
    written = retriever.answer(Query(prompt=END, completion=COMPLETION, **WHOLE))
    assert answer.value == written.value
    assert np.array_equal(scores(answer), scores(written))
    assert retriever.answer(Query(prompt="\n", completion=COMPLETION)).value != answer.value


def test_an_empty_prompt_is_refused_where_no_token_begins_a_text(retriever):
    tokenizer = copy.deepcopy(retriever.loaded.tokenizer)
    tokenizer.bos_token = None
    loaded = replace(retriever.loaded, tokenizer=tokenizer)
    for ask in (lambda: loaded.encode_query("", COMPLETION), lambda: loaded.complete("")):
        with pytest.raises(BadQuery, match=r"prompt is empty, and .* no token for the beginning"):
            ask()
    assert loaded.encode_query("\n", COMPLETION).first_target == 1


@pytest.mark.parametrize(
    ("value", "tokens", "told"),
    [
        (-1e-7, 1, "all but certain of the completion (log p = -1e-07)"),
        (0.0, 3, "all but certain"),
        (-1e-5, 1, None),
        (-199.0, 1, None),
        (-201.0, 1, "finds the completion impossible (log p = -201.0, less than a random guess"),
        (-900.0, 200, None),  # 4.5 nats a token: long, and by no means impossible
        (-900.0, 100, "impossible"),
    ],
)
def test_extreme_completions_are_answered_with_a_caution(value, tokens, told):
    found = caution("completion", value, tokens, vocabulary=400)
    assert (found is None) == (told is None)
    assert found is None or told in found


def test_the_caution_is_that_of_the_model(workspace):
    loaded = load_model(str(workspace.model))
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(200)
    retriever = Retriever(
        replace(open_index(workspace.index, load_model(str(workspace.model))), loaded=loaded)
    )
    own = retriever.answer(Query(prompt=PROMPT)).terms[0]
    assert own.completed_by_model
    assert "all but certain of the completion" in own.caution
    contrast = Query(prompt=PROMPT, completion=own.completion, against=" Lima,")
    assert "all but certain of the completion" in retriever.answer(contrast).terms[0].caution
    other = retriever.answer(Query(prompt=PROMPT, completion=" Lima,")).terms[0]
    assert "finds the completion impossible" in other.caution
    assert retriever.index.loaded is loaded


def test_a_contrast_is_the_difference_of_two_measurements(retriever):
    query = Query(prompt=PROMPT, completion=" Paris", against=" Lima", **WHOLE)
    answer = retriever.answer(query)
    expected = alone(retriever, " Paris") - alone(retriever, " Lima")
    assert scores(answer) == pytest.approx(expected, rel=1e-3, abs=1e-3 * np.abs(expected).max())
    (term,) = answer.terms
    assert term.against_log_probability is not None
    assert answer.value == term.log_probability - term.against_log_probability


def test_a_batch_is_the_weighted_sum_of_its_queries(retriever):
    terms = (
        Term(prompt=PROMPT, completion=" Paris", weight=2.0),
        Term(prompt=PROMPT, completion=" Lima", weight=-0.5),
    )
    answer = retriever.answer(Query(batch=terms, **WHOLE))
    expected = 2 * alone(retriever, " Paris") - 0.5 * alone(retriever, " Lima")
    assert scores(answer) == pytest.approx(expected, rel=1e-3, abs=1e-3 * np.abs(expected).max())
    first, second = answer.terms
    assert answer.value == pytest.approx(2 * first.log_probability - 0.5 * second.log_probability)


def test_a_completion_contrasted_with_itself_is_refused(retriever):
    with pytest.raises(BadQuery, match="nothing sets them apart"):
        retriever.answer(Query(prompt=PROMPT, completion=" Paris", against=" Paris"))


def test_opponents_are_the_lowest_scores_worst_first(retriever):
    every = np.sort(alone(retriever, " Paris"))
    query = Query(prompt=PROMPT, completion=" Paris", **{**WHOLE, "k": 4}, direction="opponents")
    answer = retriever.answer(query)
    assert [r.score for r in answer.results] == pytest.approx(every[:4], rel=1e-4)
    assert {r.direction for r in answer.results} == {"opponents"}
    assert [r.rank for r in answer.results] == [1, 2, 3, 4]
    assert {side for side, _ in answer.sided_certificates} == {"opponents"}


def test_both_directions_are_certified_apart_and_scored_once(retriever):
    query = Query(prompt=PROMPT, completion=" Paris", **{**WHOLE, "k": 3}, direction="both")
    answer = retriever.answer(query)
    every = np.sort(alone(retriever, " Paris"))
    assert [r.score for r in answer.results[:3]] == pytest.approx(every[::-1][:3], rel=1e-4)
    assert [r.score for r in answer.results[3:]] == pytest.approx(every[:3], rel=1e-4)
    sides = [side for side, _ in answer.sided_certificates]
    assert sides == ["proponents"] * 2 + ["opponents"] * 2
    assert answer.rescored_rows + answer.sampled_rows <= ROWS


def test_filters_leave_some_rows_and_the_certificates_speak_of_those(retriever):
    documents = ("facts/France", "facts/Peru", "facts/Japan")
    filters = {"document": Condition(any_of=documents), "licence": Condition(any_of=("none",))}
    query = Query(prompt=PROMPT, completion=" Paris", k=6, budget=6, filters=filters)
    answer = retriever.answer(query)
    assert {r.document for r in answer.results} == set(documents)
    assert len(answer.results) == answer.rows == 6
    by_row = alone(retriever, " Paris")
    assert [r.score for r in answer.results] == pytest.approx(
        [by_row[r.row] for r in answer.results], rel=1e-4
    )
    assert {c.status for c in answer.certificates} == {"exhaustive"}


def test_filters_that_leave_nothing_or_too_little_are_refused(retriever):
    with pytest.raises(BadQuery, match="No example meets the conditions on licence"):
        filters = {"licence": Condition(any_of=("CC0",))}
        retriever.answer(Query(prompt=PROMPT, completion=" Paris", filters=filters))
    with pytest.raises(BadQuery, match="k must be from 1 to 1, the rows that the filters leave"):
        filters = {"id": Condition(any_of=(HOSTILE_ID,))}
        retriever.answer(Query(prompt=PROMPT, completion=" Paris", k=2, filters=filters))


@pytest.mark.parametrize(
    ("condition", "held", "not_held"),
    [
        (Condition(any_of=("a", 2)), ["a", 2, 2.0], ["b", None, True]),
        (Condition(any_of=(True,)), [True], [1, "true"]),
        (Condition(at_least=2), [2, 3.5], [1, "3", None, True]),
        (Condition(at_least="1990-05", at_most="1991"), ["1990-06-01", "1991"], ["1989", 1990]),
    ],
)
def test_conditions_compare_values_of_the_same_kind(condition, held, not_held):
    assert all(condition.holds(value) for value in held)
    assert not any(condition.holds(value) for value in not_held)


def test_an_estimator_that_does_not_exist_is_refused(retriever):
    with pytest.raises(UnknownEstimator, match="no estimator 'kfca'; this version has bm25, ekfac"):
        retriever.answer(Query(prompt=PROMPT, completion=" Paris", estimator="kfca"))
    asked = Query(prompt=PROMPT, completion=" Paris", estimator="ekfac")
    assert retriever.answer(asked).estimator == "ekfac"


def test_splits_by_token_and_layer_add_up_to_the_score(retriever):
    query = Query(prompt=PROMPT, completion=" Paris", k=5, tokens=True, layers=True)
    for result in retriever.answer(query).results:
        assert result.tokens is not None
        assert result.layers is not None
        largest = max(abs(share) for share in result.layers.values())
        assert sum(result.layers.values()) == pytest.approx(result.score, abs=1e-3 * largest)
        assert sum(score for _, score in result.tokens) == pytest.approx(
            result.score, abs=1e-3 * largest
        )
        assert "".join(text for text, _ in result.tokens) == result.text
        assert result.tokens[-1][1] == 0  # nothing is predicted from the last token


def test_explanations_wait_for_whoever_runs_the_model(retriever):
    query = Query(prompt=PROMPT, completion=" Paris", k=2, tokens=True)
    with ThreadPoolExecutor(1) as pool:
        with retriever.loaded.turn:
            answer = pool.submit(retriever.answer, query)
            with pytest.raises(TimeoutError):
                answer.result(timeout=1)
        assert answer.result(timeout=60).results[0].tokens is not None


def test_tokens_that_share_a_character_tell_it_once(retriever):
    tokenizer = retriever.loaded.tokenizer
    text = "Kyōto 東京 👍🏽 is"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) > len(text)
    assert "".join(texts) == text


def test_near_duplicates_share_a_cluster(retriever):
    query = Query(prompt=PROMPT, completion=" Paris", **WHOLE, clusters=True)
    results = retriever.answer(query).results
    by_cluster: dict[int, set[str]] = {}
    for result in results:
        assert result.cluster is not None
        by_cluster.setdefault(result.cluster, set()).add(result.id.split("#")[-1])
    assert results[0].cluster == 0
    assert len(by_cluster) > 1
    for country in COUNTRIES:  # a capital and an export are no near-duplicates
        found = [r.cluster for r in results if r.document == f"facts/{country}"]
        assert found[0] != found[1]


def test_what_is_not_asked_for_is_not_computed(retriever):
    for result in retriever.answer(Query(prompt=PROMPT, completion=" Paris", k=2)).results:
        assert (result.tokens, result.layers, result.cluster) == (None, None, None)


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
USER = Message(role="user", content="The capital of France?")


@pytest.fixture(scope="module")
def chatting(retriever: Retriever) -> Retriever:
    tokenizer = copy.deepcopy(retriever.loaded.tokenizer)
    tokenizer.chat_template = CHAT
    loaded = replace(retriever.loaded, tokenizer=tokenizer)
    return Retriever(replace(retriever.index, loaded=loaded))


def test_a_conversation_is_the_text_that_its_template_writes(chatting):
    written = f"user: {USER.content}\nassistant:"
    answer = chatting.answer(Query(messages=(USER,), completion=" Paris", **WHOLE))
    (term,) = answer.terms
    assert (term.prompt, term.completion, term.caution) == (written, " Paris", None)
    plain = chatting.answer(Query(prompt=written, completion=" Paris", **WHOLE))
    assert answer.value == plain.value
    assert np.array_equal(scores(answer), scores(plain))


def test_the_assistants_last_turn_is_the_completion(chatting):
    said = Message(role="assistant", content="Paris")
    asked = {"against": "Lima", **WHOLE}
    (term,) = chatting.answer(Query(messages=(USER, said), **asked)).terms
    assert (term.completion, term.against, term.completed_by_model) == (" Paris", " Lima", False)
    given = chatting.answer(Query(messages=(USER,), completion=" Paris", against=" Lima", **WHOLE))
    assert given.terms == (term,)
    with pytest.raises(BadQuery, match="last message is the assistant's and a completion is given"):
        chatting.answer(Query(messages=(USER, said), completion=" Paris"))
    with pytest.raises(BadQuery, match="Both prompt and messages are given"):
        chatting.answer(Query(prompt=PROMPT, messages=(USER,)))


def test_a_conversation_is_completed_without_a_cut(chatting):
    own = chatting.answer(Query(messages=(USER,), max_new_tokens=6)).terms[0]
    assert own.completed_by_model
    assert own.completion_tokens <= 6
    prompt = chatting.loaded.read_prompt("", (USER,))
    (written,) = chatting.loaded.write(prompt, Writing(max_new_tokens=6))
    assert own.completion == written.text
    batch = (Term(messages=(USER,), weight=2.0), Term(prompt=PROMPT, completion=" Paris"))
    answer = chatting.answer(Query(batch=batch, max_new_tokens=6))
    assert [term.completion for term in answer.terms] == [own.completion, " Paris"]


def test_a_conversation_without_a_template_is_refused(retriever):
    with pytest.raises(BadQuery, match="has no chat template"):
        retriever.answer(Query(messages=(USER,), completion=" Paris"))


def test_a_token_across_the_boundary_is_told_in_the_answer(retriever, monkeypatch):
    answer = retriever.answer(Query(prompt=f"{PROMPT} ", completion="Paris", k=2))
    (term,) = answer.terms
    assert "the model would have read ' Paris' as one token" in term.caution
    contrast = Query(prompt=f"{PROMPT} ", completion="x", against="Paris", k=2)
    assert "' Paris' as one token" in retriever.answer(contrast).terms[0].caution
    assert retriever.answer(Query(prompt=PROMPT, completion=" Paris", k=2)).terms[0].caution is None
    written = Written(text="Paris", tokens=tuple(retriever.loaded.encode("Paris")))
    monkeypatch.setattr(type(retriever.loaded), "write", lambda *_: [written])
    own = retriever.answer(Query(prompt=f"{PROMPT} ", k=2)).terms[0]
    assert own.completed_by_model  # written after these very tokens
    assert own.caution is None


def test_samples_are_measured_by_their_mean(retriever):
    asked = Query(prompt="The", samples=5, sample_seed=3, **WHOLE)
    answer = retriever.answer(asked)
    assert [term.weight for term in answer.terms] == [0.2] * 5
    assert all(term.completed_by_model for term in answer.terms)
    assert len({term.completion for term in answer.terms}) > 1
    assert answer.value == pytest.approx(np.mean([t.log_probability for t in answer.terms]))
    expected = sum(
        0.2 * scores(retriever.answer(Query(prompt="The", completion=term.completion, **WHOLE)))
        for term in answer.terms
    )
    assert scores(answer) == pytest.approx(expected, rel=1e-3, abs=1e-3 * np.abs(expected).max())
    assert retriever.answer(asked).terms == answer.terms
    other = retriever.answer(replace(asked, sample_seed=4))
    assert [t.completion for t in other.terms] != [t.completion for t in answer.terms]


def test_empty_samples_add_nothing_and_are_told(retriever, monkeypatch):
    written = [Written(text="", tokens=()), Written(text=" Paris", tokens=None)]
    monkeypatch.setattr(type(retriever.loaded), "write", lambda *_: written)
    answer = retriever.answer(Query(prompt=PROMPT, samples=2, **WHOLE))
    (term,) = answer.terms
    assert term.weight == 0.5
    assert term.caution == "1 of the 2 samples are empty and add nothing to the mean."
    assert answer.value == pytest.approx(0.5 * term.log_probability)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"completion": " Paris"}, "asks for 2 samples .* and gives a completion"),
        ({"against": " Paris"}, "Samples of the model's own completions are not contrasted"),
    ],
)
def test_samples_beside_what_they_stand_for_are_refused(retriever, fields, told):
    with pytest.raises(BadQuery, match=told):
        retriever.answer(Query(prompt=PROMPT, samples=2, **fields))


def test_a_contrast_of_single_tokens_is_the_difference_of_their_logits(retriever):
    loaded = retriever.loaded
    first, second = (loaded.encode_query(PROMPT, text) for text in (" Paris", " Lima"))
    assert first.targets == second.targets == 1
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([first.tokens[:-1]])).logits[0, -1]
    value = retriever.answer(Query(prompt=PROMPT, completion=" Paris", against=" Lima")).value
    assert value == pytest.approx(float(logits[first.tokens[-1]] - logits[second.tokens[-1]]))
