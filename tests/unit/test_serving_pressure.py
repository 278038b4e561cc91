"""A rush of clients at a proxy: what is refused there, what goes to the replicas, and how room that is there again is found."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.types import Message

from tc_ray.serving import pressure
from tc_ray.serving.errors import queue_full
from tc_ray.serving.guard import StreamGuard
from tc_ray.serving.pressure import Passage, Pressure
from tests.unit.test_serving_guard import Replicas, answers

POST = {"type": "http", "method": "POST", "path": "/v1/score", "headers": []}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, in its only element."""
    time = [100.0]
    monkeypatch.setattr(pressure.time, "monotonic", lambda: time[0])
    return time


def let_through(found: Pressure, most: int = 1000) -> list[Passage]:
    """Requests that come now and are not refused."""
    passages: list[Passage] = []
    while len(passages) < most and not found.refuses(POST):
        passages.append(found.passage(POST))
    return passages


def test_one_is_let_through_when_one_has_ended(now: list[float]) -> None:
    found = Pressure()
    rush = let_through(found, 30)
    for refused in rush[10:]:  # there is room for ten
        refused.full()
        assert found.refuses(POST), "of those that still wait for an answer none has room"
    assert found.under_way == 10
    for ended in rush[:3]:
        ended.end()
        ended.end()
    again = let_through(found)
    assert len(again) == 3 and found.under_way == 10
    again[0].full()  # the room was taken by another proxy's
    assert let_through(found) == []


def test_trials_grow_until_one_is_refused(now: list[float]) -> None:
    found = Pressure()
    let_through(found, 5)[4].full()
    for expected in (1, 2, 4):
        assert let_through(found) == []
        now[0] += pressure.TRIAL_S
        passages = let_through(found)
        assert len(passages) == expected
    passages[0].full()
    now[0] += pressure.TRIAL_S
    assert len(let_through(found)) == 1


def test_all_is_forgotten_when_nothing_was_refused_for_a_while(now: list[float]) -> None:
    found = Pressure()
    let_through(found, 5)[4].full()
    now[0] += pressure.FORGET_S + 0.1
    assert len(let_through(found, 100)) == 100


def test_what_asks_for_no_work_is_neither_refused_nor_counted(now: list[float]) -> None:
    found, get = Pressure(), {**POST, "method": "GET"}
    let_through(found, 1)[0].full()
    assert found.refuses(POST) and not found.refuses(get)
    found.passage(get).full()
    assert found.under_way == 0


def test_a_full_server_is_told_by_the_guard(now: list[float]) -> None:
    said = json.dumps(queue_full().envelope()).encode()
    full, good = answers(429, said, retry_after=b"1", x_tc_ray_full=b"1"), answers(200, b"{}")
    replicas = Replicas(full, good, answers(429, said, retry_after=b"1"), good)
    guard = StreamGuard(replicas)

    async def ask(key: bytes) -> tuple[int, bool]:
        """Status, and whether a replica was asked."""
        before = len(replicas.asked)
        sent: list[Message] = []
        parts: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Message:
            return parts.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        await guard({**POST, "headers": [(b"authorization", key)]}, receive, send)
        if sent[0]["status"] == 429:
            assert dict(sent[0]["headers"])[b"retry-after"] == b"1" and sent[1]["body"] == said
        return int(sent[0]["status"]), len(replicas.asked) > before

    async def run() -> None:
        assert await ask(b"Bearer a") == (429, True)
        assert await ask(b"Bearer a") == (429, False)
        assert await ask(b"Bearer b") == (200, True), "a key that no replica has found good is not told anything here"
        now[0] += 10
        assert await ask(b"Bearer a") == (429, True), "a limit of its own, or one model of several"
        assert await ask(b"Bearer a") == (200, True)

    asyncio.run(run())
