"""A rush of clients at a proxy: what is refused there, what goes to the replicas, and how room that is there again is found."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Awaitable, Callable

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


def in_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that runs as a coroutine."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        asyncio.run(test(**fixtures))  # type: ignore[arg-type]

    return run


def let_through(found: Pressure, most: int = 1000) -> list[Passage]:
    """Requests that come now and are not refused."""
    passages: list[Passage] = []
    while len(passages) < most and not found.refuses(POST):
        passages.append(found.passage(POST))
    return passages


@in_a_loop
async def test_one_is_let_through_when_one_has_ended(now: list[float]) -> None:
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


@in_a_loop
async def test_trials_grow_until_one_is_refused(now: list[float]) -> None:
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


@in_a_loop
async def test_all_is_forgotten_when_nothing_was_refused_for_a_while(now: list[float]) -> None:
    found = Pressure()
    let_through(found, 5)[4].full()
    now[0] += pressure.FORGET_S + 0.1
    assert len(let_through(found, 100)) == 100


@in_a_loop
async def test_what_asks_for_no_work_is_neither_refused_nor_counted(now: list[float]) -> None:
    found, get = Pressure(), {**POST, "method": "GET"}
    let_through(found, 1)[0].full()
    assert found.refuses(POST) and not found.refuses(get)
    found.passage(get).full()
    assert found.under_way == 0


def post(key: bytes) -> dict[str, object]:
    return {**POST, "headers": [(b"authorization", key)]}


async def come(found: Pressure, keys: list[bytes]) -> list[asyncio.Task[Passage | None]]:
    """Requests that come in one instant, each as far as it gets at once."""
    tasks = [asyncio.ensure_future(found.admit(post(key))) for key in keys]
    await asyncio.sleep(0.02)
    return tasks


@in_a_loop
async def test_of_a_rush_the_rest_wait_for_the_first_answers_and_go_in_their_order() -> None:
    found = Pressure()
    tasks = await come(found, [b"a"] * 40)
    assert [task.done() for task in tasks] == [True] * pressure.MAX_NEW + [False] * (40 - pressure.MAX_NEW)
    first = tasks[0].result()
    assert first is not None
    first.answered()
    first.answered()
    await asyncio.sleep(0)
    late = asyncio.ensure_future(found.admit(POST))
    await asyncio.sleep(0.02)
    assert tasks[pressure.MAX_NEW].done() and not tasks[pressure.MAX_NEW + 1].done() and not late.done()
    assert (await found.admit({**POST, "method": "GET"})) is not None, "what asks for no work waits for nobody"
    for task in [*tasks, late]:
        await task
    assert found.under_way == 41


@in_a_loop
async def test_one_refusal_spares_the_rest_of_its_key_the_way() -> None:
    found = Pressure()
    tasks = await come(found, [b"a"] * pressure.MAX_NEW + [b"a", b"b"] * 10)
    first, second = tasks[0].result(), tasks[1].result()
    assert first is not None and second is not None
    second.answered()
    first.full()
    await asyncio.sleep(0.02)
    waited = tasks[pressure.MAX_NEW :]
    refused = [task.done() and task.result() is None for task in waited]
    assert sum(refused[::2]) >= 9, "one may have taken the place that was free when the other was answered"
    assert not any(refused[1::2]), "no replica has said anything to this key"
    for task in tasks:
        await task
    assert all(task.result() is not None for task in waited[1::2])


@in_a_loop
async def test_nobody_waits_long_for_answers_that_come_late() -> None:
    """As many as 16 each 0.1 s go on where every answer comes in one piece, and all of them within a second."""
    found, began = Pressure(), time.monotonic()
    tasks = await come(found, [b"a"] * 200)
    await asyncio.sleep(pressure.NEW_S + 0.05)
    assert 2 * pressure.MAX_NEW <= sum(task.done() for task in tasks) < 200
    assert all(passage is not None for passage in await asyncio.gather(*tasks))
    assert pressure.HOLD_S - 0.05 < time.monotonic() - began < pressure.HOLD_S + 0.5
    assert found.under_way == 200
    await asyncio.sleep(pressure.NEW_S + 0.05)
    assert found.new == 0


@in_a_loop
async def test_who_leaves_while_waiting_leaves_no_trace() -> None:
    found = Pressure()
    tasks = await come(found, [b"a"] * (pressure.MAX_NEW + 5))
    for task in tasks[pressure.MAX_NEW :]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks[: pressure.MAX_NEW]:
        passage = task.result()
        assert passage is not None
        passage.end()
    assert (found.under_way, found.new) == (0, 0)
    again = await come(found, [b"a"] * pressure.MAX_NEW)
    assert all(task.done() for task in again)


@in_a_loop
async def test_who_is_called_and_does_not_go_hands_the_turn_on() -> None:
    """Else those behind would wait to the end of their time though there is room, and newcomers behind them."""
    found = Pressure()
    tasks = await come(found, [b"a"] * (pressure.MAX_NEW + 3))
    passages = [task.result() for task in tasks[: pressure.MAX_NEW]]
    assert passages[0] is not None and passages[1] is not None
    passages[0].answered()
    tasks[pressure.MAX_NEW].cancel()
    await asyncio.sleep(0.02)
    assert [task.done() for task in tasks[pressure.MAX_NEW + 1 :]] == [True, False]
    await tasks[-1]


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
