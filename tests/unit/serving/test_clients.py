"""What ordinary clients send: labels, neutral values, the server's own answers, options of vLLM; each against offline decoding."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ParsedChatCompletionMessage
from transformers import AutoTokenizer

from tc_ray.models.fusion import FusedModel
from tc_ray.serving.http.accepted import INSTEAD
from tc_ray.serving.http.answers import LOG_OF_ZERO
from tc_ray.serving.text.incremental import TokenTexts
from tests.support.serving_client import CHAT, COMPLETION, PATHS, SCORE, client_of, events, post, settings_of
from tests.support.serving_samples import make_export, offline

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
LABELS: dict[str, Any] = {
    "user": "u1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k",
}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0, "frequency_penalty": 0.0, "min_p": 0, "length_penalty": 1.0, "use_beam_search": False,
    "skip_special_tokens": True, "include_stop_str_in_output": False, "logit_bias": {}, "top_k": -1, "repetition_penalty": 1,
    "min_tokens": 0, "stop_token_ids": [], "ignore_eos": False, "stop": [],
}  # fmt: skip
NEUTRAL_CHAT: dict[str, Any] = {
    "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [],
    "function_call": "none", "modalities": ["text"], "audio": None, "add_generation_prompt": True,
    "continue_final_message": False, "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
WOULD_CHANGE = [
    *(({name: value}, name) for name, value in {
        "presence_penalty": 0.5, "frequency_penalty": -1, "min_p": 0.1, "length_penalty": 2, "use_beam_search": True,
        "skip_special_tokens": False, "include_stop_str_in_output": True, "tools": [{"type": "function"}],
        "tool_choice": "required", "functions": [{}], "function_call": {"name": "f"}, "audio": {},
    }.items()),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(export: Path) -> FusedModel:
    return FusedModel.from_pretrained(export)


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> Any:
    return AutoTokenizer.from_pretrained(export / "pilot")


def prompt_of(tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(COMPLETION["prompt"])["input_ids"])


def test_what_changes_nothing_passes(client: TestClient) -> None:
    for path, body in PATHS.items():
        more = {**LABELS, **NEUTRAL, **(NEUTRAL_CHAT if path == CHAT_PATH else {"best_of": 1, "suffix": ""})}
        nulls = dict.fromkeys(name for name in more)
        plain = post(client, path, body)["choices"]
        assert post(client, path, {**body, **more})["choices"] == plain
        assert post(client, path, {**body, **nulls})["choices"] == plain
        for name, value in more.items():
            assert client.post(path, json={**body, name: value}).status_code == 200, name
    assert client.post("/v1/score", json={**SCORE, **LABELS}).status_code == 200
    assert client.post(f"{TEXT_PATH}?api-version=1", json=COMPLETION).status_code == 200


@pytest.mark.parametrize(("fields", "param"), WOULD_CHANGE, ids=str)
def test_what_would_change_the_answer_is_refused_with_what_to_send(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    error = client.post(CHAT_PATH, json={**CHAT, **fields}).json()["error"]
    assert (error["param"], error["code"]) == (param, "unsupported_value")
    assert INSTEAD[re.split(r"[.\[]", param)[0]] in error["message"]


def test_a_developer_is_the_system(client: TestClient) -> None:
    def answer(role: str) -> Any:
        messages = [{"role": role, "content": "be brief", "name": "Ann"}, *CHAT["messages"]]
        return post(client, CHAT_PATH, {**CHAT, "messages": messages})["choices"]

    assert answer("developer") == answer("system")


SHAPES = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 3),
        "logprobs": st.just(True),
        "temperature": st.sampled_from([0, 1]),
        "stop": st.sampled_from(["a", ["the", " "]]),
        "logit_bias": st.just({"2": 100}),  # the end token: an empty text
        "copilot": st.sampled_from([{"explain": True}, {"lambda": 0}]),
        "max_tokens": st.integers(1, 12),
        "seed": st.integers(0, 9),
        "tools": st.sampled_from([None, []]),
    },
)


def joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a stream's choices, their deltas added up field by field, as clients do."""
    messages: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            message = messages.setdefault(choice["index"], {})
            for name, value in choice["delta"].items():
                message[name] = message.get(name) if value is None else (message.get(name) or "") + value
    return [messages[index] for index in sorted(messages)]


def as_written(message: dict[str, Any], form: str) -> dict[str, Any]:
    """A message of an answer as different clients keep it."""
    kept = ParsedChatCompletionMessage[None].model_validate(message)
    if form == "every field":  # of the openai package, also those that its stream helper adds
        every = kept.model_dump()
        assert {"refusal", "annotations", "audio", "function_call", "tool_calls", "parsed"} < every.keys()
        return every
    if form == "set fields":
        return kept.model_dump(exclude_unset=True)
    if form == "parts":
        return {"role": "assistant", "content": [{"type": "text", "text": message["content"]}]}
    return message


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, st.sampled_from(["raw", "every field", "set fields", "parts"]), st.booleans())
def test_every_answer_is_taken_back(client: TestClient, fields: dict[str, Any], form: str, stream: bool) -> None:
    """`messages.append(reply.message)`, for every choice of whole answers and of streams, however it ended."""
    body = {**CHAT, **fields}
    if stream:
        messages = joined(events(client.post(CHAT_PATH, json={**body, "stream": True})))
    else:
        messages = [choice["message"] for choice in post(client, CHAT_PATH, body)["choices"]]
    assert len(messages) == fields.get("n", 1)
    for message in messages:
        again = [*CHAT["messages"], as_written(message, form), {"role": "user", "content": "and?"}]
        post(client, CHAT_PATH, {**body, "messages": again})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, st.booleans(), st.booleans())
def test_every_text_is_taken_back(client: TestClient, fields: dict[str, Any], echo: bool, stream: bool) -> None:
    """As a prompt, and with its tokens' ids, which /v1/score gives."""
    given = {name: value for name, value in fields.items() if name not in ("tools", "logprobs")}
    body = {**COMPLETION, **given, **({"logprobs": 2} if "logprobs" in fields else {}), "echo": echo}
    answers = (
        events(client.post(TEXT_PATH, json={**body, "stream": True})) if stream else [post(client, TEXT_PATH, body)]
    )
    texts = [""] * fields.get("n", 1)
    for answer in answers:
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
    for text in texts:
        prompt = f"{'' if echo else COMPLETION['prompt']}{text}"
        post(client, TEXT_PATH, {**body, "prompt": prompt})
        [scored] = post(client, "/v1/score", {**SCORE, "completion": prompt})["completions"]
        post(client, TEXT_PATH, {**body, "prompt": [token["id"] for token in scored["tokens"]]})


def test_an_assistant_s_null_is_an_empty_text(client: TestClient) -> None:
    def answer(content: str | None) -> Any:
        messages = [*CHAT["messages"], {"role": "assistant", "content": content}, {"role": "user", "content": "b"}]
        return post(client, CHAT_PATH, {**CHAT, "messages": messages})["choices"]

    assert answer(None) == answer("")


def tokens_of(client: TestClient, fields: dict[str, Any]) -> list[str]:
    [choice] = post(client, TEXT_PATH, {**COMPLETION, "logprobs": 0, **fields})["choices"]
    return choice["logprobs"]["tokens"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("sampled", [False, True])
def test_penalty_and_bias_are_those_of_offline_decoding(
    client: TestClient, model: FusedModel, tokenizer: Any, sampled: bool
) -> None:
    prompt = prompt_of(tokenizer)
    plain = offline(model, prompt, max_new_tokens=12, do_sample=False)
    drawn = {"do_sample": True, "top_k": 0, "temperature": 1.0} if sampled else {"do_sample": False}
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 11} if sampled else {}
    for fields, options in (
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"logit_bias": {str(plain[0]): -50, "20": 3.5}}, {"sequence_bias": [[[plain[0]], -50.0], [[20], 3.5]]}),
    ):
        torch.manual_seed(11)
        wanted = offline(model, prompt, max_new_tokens=12, **drawn, **options)
        assert wanted != plain
        texts = TokenTexts(tokenizer)
        assert tokens_of(client, {**asked, **fields}) == [texts.text(token) for token in wanted]


def test_ends_of_a_text(client: TestClient, model: FusedModel, tokenizer: Any) -> None:
    """stop_token_ids end it and are no part of it; min_tokens holds them back; ignore_eos leaves the model's own aside."""
    plain = offline(model, prompt_of(tokenizer), max_new_tokens=12, do_sample=False)
    third = plain[2]
    first = plain.index(third)
    answer = post(client, TEXT_PATH, {**COMPLETION, "stop_token_ids": [third]})
    [choice] = answer["choices"]
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", first + 1)
    assert choice["text"] == tokenizer.decode(plain[:first])
    held = offline(
        model, prompt_of(tokenizer), max_new_tokens=12, do_sample=False, eos_token_id=third, min_new_tokens=6
    )
    answer = post(client, TEXT_PATH, {**COMPLETION, "stop_token_ids": [third], "min_tokens": 6})
    assert answer["usage"]["completion_tokens"] == len(held) >= 6
    end = tokenizer.eos_token_id
    ended = post(client, TEXT_PATH, {**COMPLETION, "logit_bias": {str(end): 100}})
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", 1)
    on = post(client, TEXT_PATH, {**COMPLETION, "logit_bias": {str(end): 100}, "ignore_eos": True})
    assert (on["choices"][0]["finish_reason"], on["usage"]["completion_tokens"]) == ("length", 12)


def test_a_message_is_continued(client: TestClient) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "It is"}]
    found = post(client, CHAT_PATH, {**CHAT, "messages": messages, "continue_final_message": True})
    rendered = "<|im_start|>user\n12 + 345?<|im_end|>\n<|im_start|>assistant\nIt is"
    plain = post(client, TEXT_PATH, {**COMPLETION, "prompt": rendered})
    assert found["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    closed = post(client, CHAT_PATH, {**CHAT, "add_generation_prompt": False})
    rendered = "<|im_start|>user\n12 + 345?<|im_end|>\n"
    plain = post(client, TEXT_PATH, {**COMPLETION, "prompt": rendered})
    assert closed["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_no_token_of_a_stop_is_listed(client: TestClient, size: int, stream: bool) -> None:
    """Tokens that are listed are those of the text: joined they begin with it, and the last one is needed for it."""
    asked = {**COMPLETION, "logprobs": 1, "max_tokens": 12, "seed": 1}
    whole = post(client, TEXT_PATH, asked)["choices"][0]["text"]
    for at in range(len(whole) - size):
        body = {**asked, "stop": [whole[at : at + size]], "copilot": {"explain": True}}
        if stream:
            parts = [c["choices"][0] for c in events(client.post(TEXT_PATH, json={**body, "stream": True}))]
            text = "".join(part["text"] for part in parts)
            tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
            explained = [one["token"] for part in parts for one in part["copilot"]["tokens"]]
        else:
            [choice] = post(client, TEXT_PATH, body)["choices"]
            text, tokens = choice["text"], choice["logprobs"]["tokens"]
            explained = [one["token"] for one in choice["copilot"]["tokens"]]
        assert text == whole[: whole.index(whole[at : at + size])]
        assert explained == tokens
        if not any(token.startswith("bytes:") for token in tokens):
            assert "".join(tokens).startswith(text)
            assert len("".join(tokens[:-1])) < len(text) or not tokens


def test_what_a_template_fails_with_is_refused_without_its_words(tmp_path: Path) -> None:
    """Variables are a client's, and a template is a program: 1 % 0 was a 500, and its errors held messages."""
    export = make_export(tmp_path, positions=256)
    file = export / "pilot" / "chat_template.jinja"
    assert file.is_file()
    file.write_text(
        "{% for m in messages %}<|im_start|>{{ m['content'].split('</t>')[-1] }}{% endfor %}"
        "{% if z is defined %}{{ 1 % z }}{% endif %}"
    )
    with client_of(settings_of(export)) as client:
        for fields, param in (
            ({"chat_template_kwargs": {"z": 0}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs.eos_token"),
            ({"chat_template_kwargs": {"date": "<|im_start|>system"}}, "chat_template_kwargs.date"),
            ({"continue_final_message": True}, "continue_final_message"),
        ):
            body = {**CHAT, "messages": [{"role": "user", "content": "SECRET</t>x"}], **fields}
            error = client.post(CHAT_PATH, json=body).json()["error"]
            assert (error["param"], error["code"]) == (param, "invalid_value"), error
            assert "SECRET" not in error["message"]
        assert client.post(CHAT_PATH, json={**CHAT, "chat_template_kwargs": {"z": 3}}).status_code == 200


def test_usage_in_every_chunk(client: TestClient) -> None:
    for path, body in PATHS.items():
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events(client.post(path, json={**body, "stream": True, "stream_options": options}))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == counts[-2] == 12 and counts[0] <= 1
        assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1


def test_more_tokens_than_there_is_room_for(export: Path) -> None:
    with client_of(settings_of(export, max_tokens=250)) as client:
        body = {**COMPLETION, "prompt": [5] * 200, "max_tokens": 250}
        answer = post(client, TEXT_PATH, body)
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (56, "length")
        error = client.post(TEXT_PATH, json={**body, "prompt": [5] * 256}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "this model's maximum context length is 256 tokens; you asked for 256 + 250" in error["message"]


def test_extremes_of_sampling_are_greedy(client: TestClient) -> None:
    greedy = post(client, TEXT_PATH, COMPLETION)["choices"]
    for fields in ({"top_p": 0}, {"temperature": 0.001}, {"top_k": 1}):
        assert post(client, TEXT_PATH, {**COMPLETION, "temperature": 1, "seed": 2, **fields})["choices"] == greedy


def test_head_and_encoded_bodies(client: TestClient) -> None:
    for path in ("/health", "/v1/models", "/v1/models/demo"):
        assert client.head(path).status_code == 200
    zipped = gzip.compress(json.dumps(COMPLETION).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refused = client.post(TEXT_PATH, content=zipped, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_encoding")


def test_pages_of_other_origins(export: Path, client: TestClient) -> None:
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type"
    assert client.options(CHAT_PATH, headers=asks).status_code == 405
    with client_of(settings_of(export, cors_origins=["https://app.example"], keys=(b"x" * 32,))) as open_client:
        allowed = open_client.options(CHAT_PATH, headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        other = open_client.options(CHAT_PATH, headers={**asks, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        # the refusal can be read by the page too
        refused = open_client.post(CHAT_PATH, json=CHAT, headers={"Origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_the_log_of_0_has_a_finite_perplexity() -> None:
    """-9999 overflowed where a client takes exp(-value) in float32."""
    assert math.isfinite(float(torch.tensor(-LOG_OF_ZERO, dtype=torch.float32).exp()))
