"""The frozen description of the HTTP API is the code's."""

import json

from scripts.dev.openapi import OPENAPI, serialised
from service.schemas.answers import CandidatesEvent, GradientEvent, ProgressEvent


def test_the_frozen_description_is_the_codes() -> None:
    advice = "run `python -m scripts.dev.openapi` and look at what it changes for clients"
    assert OPENAPI.read_text() == serialised(), advice


def test_streams_and_their_events_are_described() -> None:
    document = json.loads(serialised())
    content = document["paths"]["/v1/query/stream"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"text/event-stream"}
    for model in (GradientEvent, CandidatesEvent, ProgressEvent):
        properties = document["components"]["schemas"][model.__name__]["properties"]
        assert set(properties) == set(model.model_fields)


def test_every_error_is_a_problem_document() -> None:
    for path, item in json.loads(serialised())["paths"].items():
        for method, operation in item.items():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert set(response["content"]) == {"application/problem+json"}, (path, method)
