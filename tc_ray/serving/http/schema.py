"""JSON Schemas of bodies and answers, with this server's limits and the rules between fields.

Invariant: what the server refuses whatever the model and the text, the schema of a body refuses too, and nothing else. What
depends on both stays out: prompts that are too long, a `score_after` that the prompt does not hold. Used by openapi.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import models_json_schema

from tc_ray.config.serving import ServingSection
from tc_ray.serving.http.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    ErrorEnvelope,
    ModelCard,
    ModelList,
    ScoreAnswer,
    State,
)
from tc_ray.serving.http.requests import MAX_SCORED, ChatRequest, CompletionRequest, ScoreBody

_IN = (CompletionRequest, ChatRequest, ScoreBody)
_OUT = (Completion, ChatCompletion, ChatChunk, ScoreAnswer, ModelCard, ModelList, State, ErrorEnvelope)
_MAX_ID = 2**31 - 1
_NOT_TRUE = {"not": {"const": True}}


def components(limits: ServingSection, models: list[str], vocab_size: int) -> dict[str, Any]:
    """Schemas by name. models: names that `model` may have. vocab_size: of the smallest vocabulary served."""
    used: list[tuple[Any, Any]] = [(shape, "validation") for shape in _IN]
    used += [(shape, "serialization") for shape in _OUT]
    schemas: dict[str, Any] = models_json_schema(used, ref_template="#/components/schemas/{model}")[1]["$defs"]
    for shape in _IN:
        body = schemas[shape.__name__]
        body["properties"]["model"]["enum"] = models
        for node in _nodes(body):
            if node.get("type") == "integer" and node.get("minimum") == 0 and node.get("maximum") == _MAX_ID:
                node["maximum"] = vocab_size - 1
            if node.get("maxItems") == MAX_SCORED:
                node["maxItems"] = limits.max_choices
        for name, most in (
            ("max_tokens", limits.max_tokens),
            ("max_completion_tokens", limits.max_tokens),
            ("n", limits.max_choices),
            ("best_of", limits.max_choices),
        ):
            for node in _nodes(body["properties"].get(name, {})):
                if node.get("type") == "integer":
                    node["maximum"] = most
        # All in one `not`: tools that make requests from a schema find more of them next to each other hard to keep to.
        body["not"] = {"anyOf": [_both(_number("lambda"), _within("copilot", _number("lambda")))]}
    for name in ("CompletionRequest", "ChatRequest"):
        schemas[name]["not"]["anyOf"].append(_needs("stream_options", {"type": "object"}, "stream", _NOT_TRUE))
    schemas["ChatRequest"]["not"]["anyOf"] += [
        _needs("top_logprobs", {"type": "integer"}, "logprobs", _NOT_TRUE),
        _both(_whole("max_tokens"), _whole("max_completion_tokens")),
    ]
    schemas["CompletionRequest"]["not"]["anyOf"] += [
        _needs("max_tokens", {"const": 0}, "echo", _NOT_TRUE),
        _needs("copilot", _within("copilot", _text("score_after"))["properties"]["copilot"], "echo", _NOT_TRUE),
        _needs(
            "copilot",
            _within("copilot", _text("score_after"))["properties"]["copilot"],
            "logprobs",
            {"not": {"type": "integer"}},
        ),
        *_best_of(limits.max_choices),
        *_choices(limits.max_choices),
    ]
    return schemas


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object of a schema."""
    if isinstance(schema, dict):
        yield schema
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _nodes(value)


def _number(name: str) -> dict[str, Any]:
    """Objects with a number of this name."""
    return {"required": [name], "properties": {name: {"type": "number"}}}


def _whole(name: str) -> dict[str, Any]:
    """Objects with a whole number of this name."""
    return {"required": [name], "properties": {name: {"type": "integer"}}}


def _text(name: str) -> dict[str, Any]:
    """Objects with a text of this name."""
    return {"required": [name], "properties": {name: {"type": "string"}}}


def _within(name: str, inner: dict[str, Any]) -> dict[str, Any]:
    """Objects with an object of this name that is as `inner` says."""
    return {"required": [name], "properties": {name: {"type": "object", **inner}}}


def _both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Objects that are both."""
    return {
        "required": [*first["required"], *second["required"]],
        "properties": {**first["properties"], **second["properties"]},
    }


def _needs(name: str, given: dict[str, Any], other: str, lacking: dict[str, Any]) -> dict[str, Any]:
    """Objects whose `name` is as `given` while `other` is `lacking`, as it also is where it is absent."""
    return {"required": [name], "properties": {name: given, other: lacking}}


def _best_of(most: int) -> list[dict[str, Any]]:
    """Objects whose `best_of` is not `n`, which is 1 by default."""
    one = {"best_of": {"const": 1}, "n": {"type": "integer", "minimum": 2}}
    more = [_needs("best_of", {"const": count}, "n", {"not": {"const": count}}) for count in range(2, most + 1)]
    return [{"required": ["best_of", "n"], "properties": one}, *more]


def _choices(most: int) -> list[dict[str, Any]]:
    """Objects with more choices, `n` times the prompts, than `most`."""
    return [
        {
            "required": ["n", "prompt"],
            "properties": {
                "n": {"type": "integer", "minimum": n},
                "prompt": {"type": "array", "minItems": most // n + 1, "items": {"type": ["string", "array"]}},
            },
        }
        for n in range(2, most + 1)
    ]
