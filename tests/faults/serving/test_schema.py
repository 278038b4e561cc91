"""The server against requests that schemathesis makes from its own OpenAPI document: good ones, and ones that break it.

Every status, header, type and body must be documented, what breaks the document is refused, nothing is an error of the
server.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.support.serving_process import ServingProcess, timed
from tests.support.serving_samples import make_export

MAX_ANSWER_S = 0.1
MAX_GROWTH_BYTES = 50_000_000
MAX_TOKENS = 8
MODES = list(GenerationMode)
NOT_CHECKED = [positive_data_acceptance]
"""Good requests can still be too long for the model, as documented; the share of those that are answered is checked."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingProcess]:
    export = make_export(tmp_path_factory.mktemp("schema"), positions=512)
    with ServingProcess(export, max_tokens=MAX_TOKENS) as server:
        yield server


def written(value: Any) -> Any:
    """`value` with 3.0 written as 3: JSON Schema calls it an integer, this server does not."""
    if isinstance(value, dict):
        return {name: written(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [written(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def consistent(body: Any) -> Any:
    """A body within this server's limits that keeps the rules between two fields: the document states neither."""
    if not isinstance(body, dict):
        return body
    body = {name: value for name, value in body.items() if value is not None}
    copilot = body.get("copilot") or {}
    if "model" in body:
        body["model"] = "demo"
    for name, most in {"n": 2, "max_tokens": MAX_TOKENS}.items():
        if name in body:
            body[name] = min(body[name], most)
    for name in ("prompt", "completion"):
        if isinstance(body.get(name), list):
            body[name] = [min(one, 200) if isinstance(one, int) else one for one in body[name][:3]]
            body[name] = [[min(id, 200) for id in one] if isinstance(one, list) else one for one in body[name]]
    for name in (
        ("max_tokens", "max_completion_tokens")
        if len({"max_tokens", "max_completion_tokens"} & body.keys()) == 2
        else ()
    ):
        body[name] = 1
    if body.get("min_tokens"):
        body["min_tokens"] = min(body["min_tokens"], body.get("max_tokens") or body.get("max_completion_tokens") or 1)
    if "stop_token_ids" in body:
        body["stop_token_ids"] = [min(id, 200) for id in body["stop_token_ids"]]
    if "logit_bias" in body:
        known = {id: more for id, more in body["logit_bias"].items() if id.isascii() and id.isdigit()}
        body["logit_bias"] = {str(int(id) % 200): more for id, more in known.items()}
    if body.get("continue_final_message"):
        body.pop("add_generation_prompt", None)
        body["messages"] = body["messages"][:1]
    for message in body.get("messages") or ():
        if message.get("content") is None and message.get("role") != "assistant":
            message["content"] = ""
    body.pop("chat_template_kwargs", None)  # names that are taken are a rule of the renderer
    if body.get("stream") is not True:
        body.pop("stream_options", None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None) if "messages" in body else None
    if body.get("max_tokens") == 0 and not body.get("echo"):
        body.pop("max_tokens", None)
    if not body.get("echo") or body.get("logprobs") is None:
        copilot.pop("score_after", None)
    return body


def drive(server: ServingProcess, mode: GenerationMode, cases: int) -> dict[str, Counter[int]]:
    """Statuses of `cases` requests to each operation of the document. Raises AssertionError telling a case to repeat."""
    document = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    refusals = document.config.checks.negative_data_rejection
    refusals.expected_statuses = [
        *refusals.expected_statuses,
        "413",
    ]  # a body that breaks the document may be too long too
    statuses: dict[str, Counter[int]] = {}
    for found in document.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # any name is a name, and a route that takes nothing cannot be given something wrong
        counted = statuses.setdefault(operation.label, Counter())
        with requests.Session() as session:
            check_operation(server, operation, mode, cases, session, counted)
    return statuses


def again(case: Any, session: requests.Session) -> tuple[Any, float]:
    """The answer to a case, and its seconds."""
    answer = case.call(session=session)
    return answer, answer.elapsed


def check_operation(
    server: ServingProcess,
    operation: Any,
    mode: GenerationMode,
    cases: int,
    session: requests.Session,
    counted: Counter[int],
) -> None:
    @seed(5)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = consistent(written(case.body))
        answer = case.call(session=session)
        counted[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=NOT_CHECKED)
        if answer.status_code >= 400 and answer.elapsed > MAX_ANSWER_S:
            _, seconds, tries = timed(server, lambda: again(case, session), MAX_ANSWER_S)
            assert seconds <= MAX_ANSWER_S, f"refused after {tries} s"

    check()


@pytest.mark.parametrize("cases", [40, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_what_the_document_allows_and_forbids(server: ServingProcess, mode: GenerationMode, cases: int) -> None:
    before, _ = server.memory_bytes()
    server.forget_peak()
    begun = time.perf_counter()
    statuses = drive(server, mode, cases)
    _, peak = server.memory_bytes()
    print({name: dict(counts) for name, counts in statuses.items()})
    print(f"{time.perf_counter() - begun:.0f} s, memory grew by {(peak - before) / 1e6:.0f} MB at most")
    for name in ("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/score"):
        assert statuses[name].total() >= cases
        answered = statuses[name][200] / statuses[name].total()
        assert answered > 0.5 if mode is GenerationMode.POSITIVE else answered < 0.1
    assert peak - before < MAX_GROWTH_BYTES
