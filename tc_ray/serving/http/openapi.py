"""The OpenAPI document of a server, made for its models, limits and keys.

Invariant: it names every route but the web page, every status a route can give, and the schema of each body. The tests hold
it against the routes and the real answers. Used by app.py for GET /openapi.json.
"""

from __future__ import annotations

from typing import Any

import tc_ray
from tc_ray.config.section import MAX_LAM
from tc_ray.serving.http.requests import MAX_STOP_CHARACTERS
from tc_ray.serving.http.schema import components
from tc_ray.serving.http.service import MIN_TIMEOUT_S, TIMEOUT_HEADER
from tc_ray.serving.http.stream import SEED_HEADER
from tc_ray.serving.models.registry import Catalogue
from tc_ray.serving.settings import ReplicaSettings

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
_WORK = (400, 404, 408, 413, 429, 500, 503, 504)
_EVENTS = """Server-sent events where `stream` is true; the schema is that of each. One chunk of one choice an event; then, if
asked for, one chunk with `usage`; then `[DONE]`. A stream that breaks off ends with an error instead."""


def document(catalogue: Catalogue, settings: ReplicaSettings) -> dict[str, Any]:
    """The document as it is at this moment."""
    models = [served.name for served in catalogue]
    vocab_size = min((served.encoder.vocab_size for served in catalogue), default=2**31)
    keyed = bool(settings.key_digests)
    parts: dict[str, Any] = {"schemas": components(settings.serving, models, vocab_size)}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "tc-ray",
            "version": tc_ray.__version__,
            "description": "Fused Pilot and Copilot behind OpenAI's API. Unknown fields are refused. The log of 0 is -9999.0.",
        },
        "paths": _paths(keyed, settings.serving.request_timeout_s),
        "components": parts,
    }
    if keyed:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _paths(keyed: bool, timeout_s: float) -> dict[str, Any]:
    refusals = (401,) if keyed else ()
    deadline = {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "description": f"seconds until the request fails with 504; {timeout_s:g} if absent, which is also the most",
        "schema": {"type": "number", "minimum": MIN_TIMEOUT_S},
    }
    score_after = {
        "name": "score_after",
        "in": "query",
        "description": "`copilot.score_after` for clients that can only set an address; without effect where no prompt is scored",
        "schema": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
    }

    lam = {
        "name": "lambda",
        "in": "query",
        "description": "`copilot.lambda` for clients that can only set an address; that of the body goes before it",
        "schema": {"type": "number", "minimum": 0, "maximum": MAX_LAM},
    }

    def work(summary: str, body: str, answer: str, chunk: str | None, *parameters: Any) -> dict[str, Any]:
        return {
            "post": {
                "summary": summary,
                "operationId": body,
                "parameters": [deadline, *parameters],
                "requestBody": {"required": True, "content": _json(body)},
                "responses": {"200": _answer(answer, chunk), **_errors(*refusals, *_WORK)},
            }
        }

    def look(summary: str, name: str, responses: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"get": {"summary": summary, "operationId": name, "responses": responses, **more}}

    state = {
        "200": _answer("State"),
        "503": {"description": "Not fit to work; `reason` says why.", "content": _json("State")},
    }
    open_to_all: dict[str, Any] = {"security": []} if keyed else {}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/completions": work("Complete texts", "CompletionRequest", "Completion", "Completion", score_after, lam),
        "/v1/chat/completions": work("Answer a conversation", "ChatRequest", "ChatCompletion", "ChatChunk"),
        "/v1/score": work("Log-probabilities under Pilot and fused model", "ScoreBody", "ScoreAnswer", None),
        "/v1/models": look("Served models", "models", {"200": _answer("ModelList"), **_errors(*refusals, 500)}),
        "/v1/models/{name}": look(
            "One served model",
            "model",
            {"200": _answer("ModelCard"), **_errors(*refusals, 404, 500)},
            parameters=[name],
        ),
        "/health": look("Whether the engines generate", "health", {**state, **_errors(500)}, **open_to_all),
        "/ready": look("Whether new requests are taken", "ready", {**state, **_errors(*refusals, 500)}),
    }


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _answer(schema: str, chunk: str | None = None) -> dict[str, Any]:
    content = _json(schema)
    if chunk is not None:
        content["text/event-stream"] = {"schema": _event(chunk)}
    answer: dict[str, Any] = {"description": "Done.", "content": content}
    if chunk is not None:
        told = "what the first choice drew from; as `seed`, it gives the same answer again"
        answer["headers"] = {SEED_HEADER: {"description": told, "schema": {"type": "string", "pattern": "^-?[0-9]+$"}}}
    return answer


def _event(chunk: str) -> dict[str, Any]:
    """Schema of one server-sent event."""
    bodies = [{"$ref": f"#/components/schemas/{name}"} for name in (chunk, "ErrorEnvelope")]
    body = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": bodies}}
    return {
        "type": "object",
        "description": _EVENTS,
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, body]}},
    }


def _errors(*statuses: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status in sorted(statuses):
        found[str(status)] = {"description": _STATUS[status], "content": _json("ErrorEnvelope")}
        if status in (429, 503):
            header = {"description": "seconds", "schema": {"type": "string", "pattern": "^[0-9]+$"}}
            found[str(status)]["headers"] = {"Retry-After": header}
    return found
