"""The OpenAPI document: FastAPI's own, with the limits, models and keys of this server.

Invariant: it names every route but the web page, every status that a route can give, and the schema of each body. Rules
between two fields stand in the descriptions of the fields only. Used by routes.py (`errors`, `generated`) and by app.py for
GET /openapi.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import tc_ray
from tc_ray.config.serving import ServingSection
from tc_ray.serving.headers import SEED_HEADER
from tc_ray.serving.http.answers import ChatChunk, ErrorEnvelope
from tc_ray.serving.http.requests import MAX_SCORED, MAX_TOKEN_ID, ChatRequest, CompletionRequest, ScoreBody
from tc_ray.serving.models.registry import ModelRegistry

_REFS = "#/components/schemas/{model}"
_DESCRIPTION = "Fused Pilot and Copilot behind OpenAI's API. Unknown fields are refused. The log of 0 is -9999.0."
_STATUS = {
    400: "The body, a header or a query parameter cannot be used; `error.param` names it.",
    401: "No valid API key.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    429: "Too many requests of this key, or on this server.",
    500: "The server failed.",
    503: "The server is shutting down, its engine has stopped, or no place is free.",
    504: "The request was not done by its deadline.",
}
_EVENTS = """Server-sent events where `stream` is true; the schema is that of each. One chunk of one choice per event; then, if
asked for, one chunk with `usage`; then `[DONE]`. A stream that breaks off ends with an error instead."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for error statuses; every route can give 500."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in (*statuses, 500):
        found[status] = {"description": _STATUS[status], "model": ErrorEnvelope}
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": {"description": "seconds", "schema": _digits("^[0-9]+$")}}
    return found


def generated(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for a route that also streams: the seed and the events."""
    bodies = [{"$ref": _REFS.format(model=model.__name__)} for model in (chunk, ErrorEnvelope)]
    body = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": bodies}}
    event = {
        "type": "object",
        "description": _EVENTS,
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, body]}},
    }
    seed = "what the first choice drew from; sent as `seed`, it gives the same response again"
    headers = {SEED_HEADER: {"description": seed, "schema": _digits("^-?[0-9]+$")}}
    return {200: {"content": {"text/event-stream": {"schema": event}}, "headers": headers}}


def _digits(pattern: str) -> dict[str, str]:
    return {"type": "string", "pattern": pattern}


def document(app: FastAPI, registry: ModelRegistry, limits: ServingSection, *, keys: bool) -> dict[str, Any]:
    """The document as it is now. keys: the server has API keys."""
    found = get_openapi(title="tc-ray", version=tc_ray.__version__, description=_DESCRIPTION, routes=app.routes)
    schemas = found["components"]["schemas"]
    schemas.update(models_json_schema([(ChatChunk, "serialization")], ref_template=_REFS)[1]["$defs"])
    for unused in (
        "HTTPValidationError",
        "ValidationError",
    ):  # FastAPI's own form of errors, which this server does not send
        schemas.pop(unused, None)
    operations = [(path, operation) for path, item in found["paths"].items() for operation in item.values()]
    for _, operation in operations:
        operation["responses"].pop("422", None)
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        content = {"application/json": {"schema": {"$ref": _REFS.format(model=ErrorEnvelope.__name__)}}}
        for path, operation in operations:
            if path == "/health":
                operation["security"] = []
            else:
                operation["responses"]["401"] = {"description": _STATUS[401], "content": content}
    for shape in (CompletionRequest, ChatRequest, ScoreBody):
        _add_limits(schemas[shape.__name__]["properties"], registry, limits)
    return found


def _add_limits(fields: dict[str, Any], registry: ModelRegistry, limits: ServingSection) -> None:
    """Write the server's models and limits into the schema of a body."""
    fields["model"]["enum"] = [served.name for served in registry]
    vocab_size = min((served.encoder.vocab_size for served in registry), default=MAX_TOKEN_ID + 1)
    most = {"max_tokens": limits.max_tokens, "max_completion_tokens": limits.max_tokens}
    most |= {
        "n": limits.max_choices,
        "best_of": limits.max_choices,
        "seed": 2**63 - 1,
    }  # FastAPI writes this as a float
    for name, schema in fields.items():
        for node in _nodes(schema):
            if name in most and node.get("type") == "integer":
                node["maximum"] = most[name]
            if name in ("prompt", "completion") and node.get("maximum") == MAX_TOKEN_ID:
                node["maximum"] = vocab_size - 1
            if node.get("maxItems") == MAX_SCORED:
                node["maxItems"] = limits.max_choices


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object of a schema."""
    if isinstance(schema, dict):
        yield schema
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _nodes(value)
