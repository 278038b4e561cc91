"""The failover proxy over apps that end early: Ray Serve's proxy returns without an error when a replica dies."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence

import pytest
from starlette.types import Message, Receive, Scope, Send

from tc_ray.serving.failover import proxy as proxy_module
from tc_ray.serving.failover.proxy import FailoverProxy
from tc_ray.serving.wire import ALIVE_MESSAGE
from tests.support.failover_apps import (
    DONE,
    STREAMED,
    App,
    Client,
    Replicas,
    answers,
    dies,
    dies_in_its_answer,
    event,
    streams,
)


def test_sound_answers_pass() -> None:
    client = Client(Replicas(answers(200, b'{"a": 1}')))
    assert (client.status, client.text) == (200, b'{"a": 1}')
    client = Client(Replicas(streams(event(0, "a"), event(0, "b"), DONE)))
    assert client.text == event(0, "a") + event(0, "b") + DONE


def test_cut_stream_goes_on_where_it_ended() -> None:
    first = [event(0, "a"), event(1, "x"), event(0, "b")]
    replicas = Replicas(streams(*first), streams(*first, event(0, "c"), DONE))
    client = Client(replicas)
    assert client.text == b"".join(first) + event(0, "c") + DONE
    assert client.status == 200
    resume = json.loads(replicas.asked[1][b"x-tc-ray-resume"])
    assert (resume["id"], resume["created"]) == ("cmpl-1", 7)
    assert replicas.asked[1][b"x-tc-ray-seed"] == b"42"
    assert b"x-tc-ray-resume" not in replicas.asked[0]


def hangs(*events: bytes, alive: int = 0) -> App:
    """A replica that sends these events, gives so many signs of life, and then says nothing more."""

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        await streams(*events)(scope, receive, send)
        for _ in range(alive):
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})
        await asyncio.Event().wait()

    return replica


async def says_nothing(_: Scope, __: Receive, ___: Send) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("first", [hangs(event(0, "a")), hangs(), says_nothing], ids=["begun", "head", "nothing"])
def test_stream_of_a_replica_that_hangs_goes_on_elsewhere(monkeypatch: pytest.MonkeyPatch, first: App) -> None:
    monkeypatch.setattr(proxy_module, "HUNG_S", 0.3)
    monkeypatch.setattr(proxy_module, "HEAD_S", 0.3)
    replicas = Replicas(first, streams(event(0, "a"), event(0, "b"), DONE))
    assert Client(replicas, body=STREAMED).text == event(0, "a") + event(0, "b") + DONE
    assert replicas.asked[0][b"x-tc-ray-alive"] == b"1"


def test_a_sign_of_life_keeps_a_stream_and_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "HUNG_S", 0.3)
    ended: list[float] = []

    async def works_long(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(8):
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": event(0, "b") + DONE, "more_body": False})
        ended.append(time.monotonic())

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        await streams(event(0, "a"))(scope, receive, send)
        await works_long(scope, receive, send)

    assert Client(Replicas(replica), body=STREAMED).text == event(0, "a") + event(0, "b") + DONE
    assert len(ended) == 1


@pytest.mark.parametrize("begun", [False, True])
def test_while_there_is_no_replica_a_stream_waits(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """Serve holds a request while its only replica is replaced; silence then is no fault of a replica."""
    for name in ("HUNG_S", "HEAD_S"):
        monkeypatch.setattr(proxy_module, name, 0.2)
    whole = streams(event(0, "a"), event(0, "b"), DONE)

    async def comes_late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1.5)
        await whole(scope, receive, send)

    before = [streams(event(0, "a"))] if begun else []
    replicas = Replicas(*before, says_nothing, says_nothing, says_nothing, comes_late)
    client = Client(replicas, body=STREAMED)
    assert (client.status, client.text) == (200, event(0, "a") + event(0, "b") + DONE)


def test_a_whole_answer_of_a_replica_that_hangs_is_made_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "HEAD_S", 0.3)
    assert Client(Replicas(says_nothing, answers(200, b"{}"))).text == b"{}"


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_long_whole_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """While its replica gives signs of life; what takes no work of the engine gives none."""
    for name in ("HUNG_S", "HEAD_S"):
        monkeypatch.setattr(proxy_module, name, 0.3)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(8):
            await asyncio.sleep(0.1)
            if method == "POST":
                await send(ALIVE_MESSAGE)
        await answers(200, b"{}")(scope, receive, send)

    replicas = Replicas(slow)
    client = Client(replicas, method=method)
    assert (client.status, client.text, len(replicas.asked)) == (200, b"{}", 1)


ALLOWED = b"access-control-allow-origin"


@pytest.mark.parametrize("allowed", [b"https://app.example", b"*"])
def test_pages_that_may_read_answers_may_read_the_proxys_own_errors(allowed: bytes) -> None:
    """A browser asks the replica first, without a body; the proxy learns from what that allows."""
    proxy = FailoverProxy(Replicas(answers(200, b"", access_control_allow_origin=allowed)), max_body_bytes=3)
    ours, other = ([(b"origin", name)] for name in (b"https://app.example", b"https://evil.example"))

    def refused(headers: list[tuple[bytes, bytes]]) -> bytes | None:
        sent = sent_by(proxy, part(b"xxxx", more=False), headers=headers)
        assert sent[0]["status"] == 413
        return dict(sent[0]["headers"]).get(ALLOWED)

    assert refused(ours) is None
    assert sent_by(proxy, part(b"{}", more=False), headers=ours)[0]["status"] == 200
    assert refused(ours) == allowed
    assert refused(other) == (b"*" if allowed == b"*" else None)


def test_choices_may_come_in_another_order() -> None:
    first = [event(0, "a"), event(0, "b"), event(1, "x")]
    again = [event(1, "x"), event(1, "y"), event(0, "a"), event(0, "b"), event(0, "c")]
    assert Client(Replicas(streams(*first), streams(*again, DONE))).text == (
        b"".join(first) + event(1, "y") + event(0, "c") + DONE
    )


def test_stream_cut_in_the_middle_of_an_event() -> None:
    replicas = Replicas(streams(event(0, "a"), event(0, "b")[:9]), streams(event(0, "a"), event(0, "b"), DONE))
    assert Client(replicas).text == event(0, "a") + event(0, "b") + DONE


def test_stream_cut_before_its_first_event_begins_anew_with_its_seed() -> None:
    replicas = Replicas(streams(), streams(event(0, "a"), DONE))
    assert Client(replicas).text == event(0, "a") + DONE
    assert b"x-tc-ray-resume" not in replicas.asked[1]
    assert replicas.asked[1][b"x-tc-ray-seed"] == b"42"


def test_stream_cut_while_it_is_repeated() -> None:
    events = [event(0, text) for text in "abcd"]
    replicas = Replicas(streams(*events[:3]), streams(events[0]), streams(*events, DONE))
    assert Client(replicas).text == b"".join(events) + DONE


@pytest.mark.parametrize(
    "again",
    [
        [event(0, "a"), event(0, "B"), event(0, "c"), DONE],
        [event(0, "a"), DONE],
        [event(1, "a"), event(1, "b"), event(1, "c"), DONE],
    ],
)
def test_texts_of_two_generations_are_not_joined(again: list[bytes]) -> None:
    text = Client(Replicas(streams(event(0, "a"), event(0, "b")), streams(*again))).text
    error = text.removeprefix(event(0, "a") + event(0, "b")).removeprefix(event(1, "a") + event(1, "b") + event(1, "c"))
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "replica_ended"
    assert b"came out otherwise" in text and event(0, "c") not in text


def test_logprobs_may_differ_in_their_last_digits() -> None:
    def told(text: str, logprob: float) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": {"token_logprobs": [logprob]}}
        return b"data: " + json.dumps({"id": "cmpl-1", "created": 7, "choices": [choice]}).encode() + b"\n\n"

    replicas = Replicas(streams(told("a", -1.25)), streams(told("a", -1.2500001), told("b", -2.0), DONE))
    assert Client(replicas).text == told("a", -1.25) + told("b", -2.0) + DONE


def test_stream_waits_for_a_free_place() -> None:
    full = answers(429, b'{"error": {"message": "full", "code": "queue_full"}}', retry_after=b"0")
    replicas = Replicas(streams(event(0, "a")), full, streams(event(0, "a"), event(0, "b"), DONE))
    assert Client(replicas).text == event(0, "a") + event(0, "b") + DONE


def test_stream_that_ends_every_replica_ends_in_an_error_event() -> None:
    replicas = Replicas(*[streams(event(0, "a"))] * 9)
    text = Client(replicas).text
    assert len(replicas.asked) == 4
    last = text.rstrip(b"\n").rsplit(b"\n\n", 1)[1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "replica_ended"
    assert DONE not in text


def test_stream_that_is_refused_elsewhere_ends_in_an_error_event() -> None:
    refused = answers(400, b'{"error": {"message": "no such place", "code": "invalid_value"}}')
    text = Client(Replicas(streams(event(0, "a")), refused)).text
    assert text.startswith(event(0, "a")) and b"no such place" in text and DONE not in text


def test_stream_is_not_continued_by_another_copilot() -> None:
    text = Client(Replicas(streams(event(0, "a")), streams(event(0, "b"), DONE, copilot=b"v2"))).text
    assert text.startswith(event(0, "a") + b'data: {"error"') and b"another Copilot" in text
    assert event(0, "b") not in text


def test_error_event_is_an_end() -> None:
    failed = b'data: {"error": {"message": "it failed"}}\n\n'
    replicas = Replicas(streams(event(0, "a"), failed))
    assert Client(replicas).text == event(0, "a") + failed
    assert len(replicas.asked) == 1


@pytest.mark.parametrize("first", [dies, dies_in_its_answer])
def test_answer_that_had_not_begun_is_made_anew_once(first: App) -> None:
    assert Client(Replicas(first, answers(200, b"{}"))).text == b"{}"
    client = Client(Replicas(first, first))
    assert (client.status, client.error["code"], client.headers[b"retry-after"]) == (503, "replica_ended", b"1")


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [
        (503, 503, "unavailable"),
        (429, 429, "queue_full"),
        (404, 503, "not_ready"),
        (500, 500, "internal_error"),
    ],
)
def test_serves_own_errors_get_the_envelope(status: int, told: int, code: str) -> None:
    client = Client(Replicas(answers(status, b"secrets of the inside", kind=b"text/plain")))
    assert (client.status, client.error["code"]) == (told, code)
    assert "secrets" not in client.error["message"]
    assert (b"retry-after" in client.headers) == (told in (429, 503))


def test_errors_of_the_app_pass_as_they_are() -> None:
    body = b'{"error": {"message": "no", "code": "queue_full"}}'
    client = Client(Replicas(answers(429, body, retry_after=b"3")))
    assert (client.status, client.text, client.headers[b"retry-after"]) == (429, body, b"3")


def test_headers_that_are_not_the_clients_business() -> None:
    replicas = Replicas(answers(200, b"{}"))
    given = {
        b"x-tc-ray-seed": b"1",
        b"x-tc-ray-resume": b"{}",
        b"x-tc-ray-alive": b"0",
        b"x-request-disconnect-disabled": b"?1",
        b"x-request-timeout-seconds": b"1e9",
        b"serve_multiplexed_model_id": b"a",
        b"x-request-id": b"\xe9",
        b"authorization": b"Bearer k",
    }
    Client(replicas, headers=list(given.items()))
    assert replicas.asked[0] == {b"authorization": b"Bearer k", b"x-tc-ray-alive": b"1"}


def sent_by(proxy: FailoverProxy, *parts: Message, headers: Sequence[tuple[bytes, bytes]] = ()) -> list[Message]:
    """What a client gets that sends these parts of a body and then nothing more."""
    sent: list[Message] = []
    queue = list(parts)

    async def receive() -> Message:
        if queue:
            return queue.pop(0)
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(proxy(scope, receive, send))
    return sent


def part(body: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_in_parts_is_passed_on_whole() -> None:
    sent = sent_by(FailoverProxy(Replicas(dies, answers(200, b"{}"))), part(b"{", more=True), part(b"}", more=False))
    assert sent[0]["status"] == 200


def test_a_long_body_is_read_no_further_than_the_app_can_take() -> None:
    proxy = FailoverProxy(Replicas(), max_body_bytes=3)
    sent = sent_by(proxy, *[part(b"xx", more=True)] * 5)
    assert (sent[0]["status"], proxy.held_bytes) == (413, 0)


def test_bodies_held_at_once_are_bounded() -> None:
    whole: Message = {"type": "http.request", "body": b"{}", "more_body": False}
    proxy = FailoverProxy(Replicas(*[answers(200, b"{}")] * 2), max_held_bytes=100)
    proxy.held_bytes = 99  # of others
    sent = sent_by(proxy, whole)
    assert sent[0]["status"] == 503 and dict(sent[0]["headers"])[b"retry-after"] == b"1"
    assert proxy.held_bytes == 99
    proxy.held_bytes = 98
    assert sent_by(proxy, whole)[0]["status"] == 200
    assert proxy.held_bytes == 98


def test_nothing_is_sent_again_for_a_client_that_left() -> None:
    async def replica(_: Scope, receive: Receive, send: Send) -> None:
        await streams(event(0, "a"))(_, receive, send)
        assert (await receive())["type"] == "http.disconnect"  # then Serve cancels the replica and returns

    async def run() -> int:
        replicas = Replicas(replica)
        sent: list[Message] = []
        queue: list[Message] = [
            {"type": "http.request", "body": b"{}", "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return queue.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await FailoverProxy(replicas)(scope, receive, send)
        return len(replicas.asked)

    assert asyncio.run(run()) == 1


def test_text_that_looks_like_an_index_is_not_one() -> None:
    def told(text: str) -> bytes:
        chunk = {"id": "a", "created": 1, "choices": [{"text": text, "index": 3}]}
        return f"data: {json.dumps(chunk)}\n\n".encode()

    events = [told('a "index": 9, b'), told("c")]
    assert Client(Replicas(streams(*events), streams(*events, told("d"), DONE))).text == (
        b"".join(events) + told("d") + DONE
    )
