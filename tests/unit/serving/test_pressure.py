"""A rush of clients at a proxy: what is refused there, what goes to the replicas, and how room that is there again is found."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from tc_ray.serving.errors import queue_full
from tc_ray.serving.failover import pressure
from tc_ray.serving.failover.pressure import Passage, Pressure
from tc_ray.serving.failover.proxy import StreamGuard
from tests.unit.serving.test_failover import Replicas, answers

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


@pytest.fixture
def no_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a request age nor does anybody stop waiting."""
    monkeypatch.setattr(pressure, "NEW_S", 1000.0)
    monkeypatch.setattr(pressure, "HOLD_S", 1000.0)


class Rush:
    """Requests that come in one instant. gone: numbers of those let through, in their order; refused: of the others."""

    def __init__(self, found: Pressure, keys: list[bytes]) -> None:
        self.gone: dict[int, Passage] = {}
        self.refused: list[int] = []
        self.tasks = [asyncio.ensure_future(self._one(found, number, key)) for number, key in enumerate(keys)]

    async def _one(self, found: Pressure, number: int, key: bytes) -> None:
        passage = await found.admit(post(key))
        if passage is None:
            self.refused.append(number)
        else:
            self.gone[number] = passage

    async def settle(self) -> list[int]:
        """Who has gone when nothing moves any more."""
        for _ in range(50):
            await asyncio.sleep(0)
        return list(self.gone)


@in_a_loop
async def test_of_a_rush_the_rest_wait_for_the_first_answers_and_go_in_their_order(no_timers: None) -> None:
    found = Pressure()
    rush = Rush(found, [b"a"] * 60)
    assert await rush.settle() == list(range(pressure.MAX_NEW))
    rush.gone[0].answered()
    rush.gone[0].answered()
    assert await rush.settle() == list(range(pressure.MAX_NEW + 1))
    for number in range(1, 20):  # one after the other, and all in one turn of the loop
        if number in rush.gone:
            rush.gone[number].answered()
    late = Rush(found, [b"a"])
    await rush.settle()
    assert not late.gone, "who comes now waits behind the others"
    assert (await found.admit({**POST, "method": "GET"})) is not None, "what asks for no work waits for nobody"
    while len(rush.gone) < 60:
        next(passage for passage in rush.gone.values() if passage._aged).answered()
        await rush.settle()
        assert found.new <= pressure.MAX_NEW
    assert list(rush.gone) == list(range(60))
    rush.gone[59].answered()
    assert await late.settle() == [0]
    assert found.under_way == 61


@in_a_loop
async def test_one_refusal_spares_the_rest_of_its_key_the_way(no_timers: None) -> None:
    found = Pressure()
    rush = Rush(found, [b"a"] * pressure.MAX_NEW + [b"a", b"b"] * 10)
    await rush.settle()
    rush.gone[0].full()
    gone = await rush.settle()
    assert rush.refused == list(range(pressure.MAX_NEW, pressure.MAX_NEW + 20, 2))
    assert gone == [*range(pressure.MAX_NEW), pressure.MAX_NEW + 1], "no replica has said anything to the other key"
    for _ in range(20):
        for passage in list(rush.gone.values()):
            passage.answered()
        await rush.settle()
    assert len(rush.gone) == pressure.MAX_NEW + 10 and len(rush.refused) == 10


@in_a_loop
async def test_nobody_waits_long_where_nothing_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "NEW_S", 1000.0)
    monkeypatch.setattr(pressure, "HOLD_S", 0.3)
    found, began = Pressure(), time.monotonic()
    rush = Rush(found, [b"a"] * 40)
    assert len(await rush.settle()) == pressure.MAX_NEW
    await asyncio.gather(*rush.tasks)
    assert len(rush.gone) == found.under_way == 40 and time.monotonic() - began > 0.25


@in_a_loop
async def test_a_steady_load_of_answers_in_one_piece_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that takes its time makes room for two; whoever comes after a pause finds the first bound again."""
    monkeypatch.setattr(pressure, "NEW_S", 0.1)
    monkeypatch.setattr(pressure, "HOLD_S", 1000.0)
    found = Pressure()
    rush = Rush(found, [b"a"] * 150)
    await asyncio.wait_for(asyncio.gather(*rush.tasks), 30)
    assert list(rush.gone) == list(range(150)) and found.allowed > 100
    while found.new:
        await asyncio.sleep(0.02)
    monkeypatch.setattr(pressure, "NEW_S", 1000.0)
    assert len(await Rush(found, [b"a"] * 40).settle()) == pressure.MAX_NEW


@in_a_loop
async def test_who_is_cancelled_while_waiting_leaves_no_trace(no_timers: None) -> None:
    found = Pressure()
    rush = Rush(found, [b"a"] * (pressure.MAX_NEW + 5))
    await rush.settle()
    for task in rush.tasks[pressure.MAX_NEW :]:
        task.cancel()
    await asyncio.gather(*rush.tasks, return_exceptions=True)
    for passage in rush.gone.values():
        passage.end()
    assert (found.under_way, found.new) == (0, 0)
    assert len(await Rush(found, [b"a"] * pressure.MAX_NEW).settle()) == pressure.MAX_NEW


@in_a_loop
async def test_who_is_called_and_does_not_go_hands_the_turn_on(no_timers: None) -> None:
    """Else those behind would wait to the end of their time though there is room, and newcomers behind them."""
    found = Pressure()
    rush = Rush(found, [b"a"] * (pressure.MAX_NEW + 3))
    await rush.settle()
    rush.gone[0].answered()
    rush.tasks[pressure.MAX_NEW].cancel()
    assert (await rush.settle())[pressure.MAX_NEW :] == [pressure.MAX_NEW + 1]


@in_a_loop
async def test_a_trial_is_not_spent_on_who_has_to_wait(now: list[float], no_timers: None) -> None:
    found = Pressure()
    rush = Rush(found, [b"a"] * pressure.MAX_NEW)
    await rush.settle()
    rush.gone[0].full()
    held = Rush(found, [b"b"])  # takes the place that is free
    await held.settle()
    now[0] += pressure.TRIAL_S
    assert await Rush(found, [b"a"]).settle() == [], "all places of newcomers are taken"
    held.gone[0].answered()
    assert await Rush(found, [b"a"]).settle() == [0]


@in_a_loop
async def test_free_places_are_for_those_who_wait_already(now: list[float], no_timers: None) -> None:
    """Four more places free themselves than may be taken at once: four wait for their turn, who comes behind is refused."""
    found, running, most = Pressure(), [], pressure.MAX_NEW
    for _ in range(2):
        rush = Rush(found, [b"a"] * most)
        await rush.settle()
        for passage in rush.gone.values():
            passage.answered()
            running.append(passage)
    over = Rush(found, [b"a"])
    await over.settle()
    over.gone[0].full()
    for passage in running[: most + 4]:
        passage.end()
    rush = Rush(found, [b"a"] * (most + 14))
    assert await rush.settle() == list(range(most))
    assert rush.refused == list(range(most + 4, most + 14))
    for passage in list(rush.gone.values()):
        passage.answered()
    assert await rush.settle() == list(range(most + 4)) and found.under_way == 2 * most


@in_a_loop
async def test_the_guard_holds_a_rush_until_a_replica_has_answered(no_timers: None) -> None:
    """One more than may: the last one reaches the replicas when the first has its head."""
    asked: list[asyncio.Future[None]] = []

    async def replica(_: object, receive: object, send: Callable[[Message], Awaitable[None]]) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asked.append(answer)
        await answer
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await asyncio.Event().wait()

    guard = StreamGuard(replica)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(_: Message) -> None:
        pass

    tasks = [asyncio.ensure_future(guard(dict(POST), receive, send)) for _ in range(pressure.MAX_NEW + 1)]
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(asked) == pressure.MAX_NEW
    asked[0].set_result(None)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(asked) == pressure.MAX_NEW + 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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
