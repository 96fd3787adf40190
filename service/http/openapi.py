"""The OpenAPI description, as the routes answer in truth."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from service.schemas.answers import CandidatesEvent, GradientEvent, ProgressEvent

EVENTS = (GradientEvent, CandidatesEvent, ProgressEvent)


def describe(app: FastAPI) -> None:
    """Have ``app`` say what the events of its streams hold, which no route returns."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, events = models_json_schema(
                [(model, "serialization") for model in EVENTS],
                ref_template="#/components/schemas/{model}",
            )
            schemas = document["components"]["schemas"]
            for name, schema in events["$defs"].items():
                schemas.setdefault(name, schema)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
