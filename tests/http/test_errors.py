"""The table of problems: one document for responses, streams and jobs, and its description."""

import pytest
from fastapi.exceptions import RequestValidationError

from service.http import problems as errors
from service.http.problems import PROBLEMS, described, problem_document, problem_response
from service.models import BadQuery
from service.schemas.answers import ProblemResponse


@pytest.mark.parametrize("kind", PROBLEMS, ids=lambda kind: kind.__name__)
def test_documents_of_streams_and_jobs_are_those_of_responses(kind: type[Exception]) -> None:
    document = problem_document("/v1/query", kind("It went wrong."))
    assert ProblemResponse.model_validate(document).status == PROBLEMS[kind].status
    assert (document["detail"], document["instance"]) == ("It went wrong.", "/v1/query")
    response = problem_response("/v1/query", kind("It went wrong."))
    assert ProblemResponse.model_validate_json(bytes(response.body)).model_dump() == document
    assert response.status_code == document["status"]
    assert response.media_type == "application/problem+json"
    assert ("retry-after" in response.headers) == (PROBLEMS[kind].retry_after is not None)
    assert ("www-authenticate" in response.headers) == (kind is errors.Unauthorised)
    assert response.headers.get("connection", "") == ("close" if PROBLEMS[kind].closes else "")


def test_the_nearest_ancestor_counts() -> None:
    class Odd(BadQuery):
        pass

    assert problem_document("/", Odd("x"))["status"] == 422


def test_an_unknown_error_tells_nothing_of_itself() -> None:
    document = problem_document("/", ZeroDivisionError("secret"))
    assert document["status"] == 500
    assert "secret" not in str(document)


def test_halves_of_characters_are_replaced() -> None:
    document = problem_document("/", BadQuery("half \ud800."))
    assert document["detail"] == "half ?."
    assert problem_response("/", BadQuery("half \ud800.")).status_code == 422


def test_an_invalid_request_has_the_same_document_everywhere() -> None:
    found = {"type": "missing", "loc": ("body", "queries", 0, "k"), "msg": "Field required"}
    document = problem_document("/v1/jobs", RequestValidationError([found]))
    assert (document["status"], document["detail"]) == (422, "queries.0.k: Field required.")


def test_the_statuses_of_the_contract() -> None:
    expected = {
        errors.MalformedBody: 400,
        errors.Unauthorised: 401,
        errors.Forbidden: 403,
        errors.UnknownEstimator: 404,
        errors.TooSlow: 408,
        errors.Conflict: 409,
        errors.TooLarge: 413,
        errors.WrongContentType: 415,
        errors.WrongHost: 421,
        errors.Overloaded: 429,
        errors.TooManyJobs: 429,
        errors.HeadTooLarge: 431,
        errors.DeadlinePassed: 429,
        errors.ShuttingDown: 503,
    }
    assert {kind: PROBLEMS[kind].status for kind in expected} == expected
    assert PROBLEMS[errors.Overloaded].retry_after == 1


def test_the_description_names_each_status_once_with_its_titles() -> None:
    found = described(404, 429)
    assert set(found) == {404, 429, *errors.GUARDS}
    assert "Too many queries at once" in found[429]["description"]
    assert "Unknown job" in found[404]["description"]
    for response in found.values():
        assert list(response["content"]) == ["application/problem+json"]
