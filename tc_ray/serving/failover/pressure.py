"""What a proxy knows of the room behind it, so that under a rush of clients a refusal does not cost what an answer costs.

When a replica says that it is full, as many requests as are under way through this proxy just then are taken for all that
there is room for: from then on one is let through when one has ended, and now and then one more, as a trial. A client is
refused here only if a replica has refused its key as full before: nobody is told so here who would be told 401 there.

Of many that come in one instant only MAX_NEW are sent on before the replicas have answered; the others wait, HOLD_S at most,
so that one refusal spares the rest the way. Answers in one piece come late by nature: each that is not there after NEW_S
makes room for two, so that a steady load of them is not held back.
Invariant: where nothing was refused for `FORGET_S`, nothing is refused here. Used by the stream guard, in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from starlette.types import Scope

FULL_HEADER = b"x-tc-ray-full"
"""Of a replica's refusal that any other request would get too: no model has a free place."""
FORGET_S = 2.0
TRIAL_S = 0.5
"""Between trials; each that succeeds makes the next one twice as large."""
MAX_TRIAL = 64
MAX_KEYS = 1000
MAX_NEW = 8
"""Requests that are sent on before a replica has said anything to them, at first."""
NEW_S = 0.1
"""A request counts as new no longer than this."""
HOLD_S = 1.0


class Passage:
    """A request on its way to the replicas."""

    def __init__(self, pressure: Pressure, key: bytes, counts: bool) -> None:
        self._pressure, self._key, self._counts = pressure, key, counts
        self._aged: asyncio.TimerHandle | None = None
        pressure.under_way += counts
        if counts:
            pressure.new += 1
            self._aged = asyncio.get_running_loop().call_later(NEW_S, self._age)

    def answered(self) -> None:
        """A replica has said something to it. A second call does nothing."""
        if self._aged is not None:
            self._aged.cancel()
            self._aged = None
            self._pressure.new -= 1
            self._pressure.wake()

    def _age(self) -> None:
        self._pressure.allowed += 1
        self.answered()
        self._pressure.wake()

    def full(self) -> None:
        """It was refused because the server is full."""
        if self._counts:
            self.end()
            self._pressure.note_full(self._key)

    def end(self) -> None:
        """It has been answered to the end, or given up. A second call does nothing."""
        self.answered()
        self._pressure.under_way -= self._counts
        self._counts = False


class Pressure:
    """One proxy's."""

    def __init__(self) -> None:
        self.under_way = 0
        """Requests for work that are with replicas."""
        self.new = 0
        """Those of them that wait for a first word."""
        self.allowed = MAX_NEW
        """So many of them at most, unless they have waited for long."""
        self._waiting: deque[tuple[bytes, asyncio.Future[bool]]] = deque()
        """Key, and a future: True when it is called because there is room, False when it is to look what has changed."""
        self._called = 0
        """Those that were called and have not gone yet."""
        self._room: int | None = None
        """None: nothing was refused lately."""
        self._told: set[bytes] = set()
        self._refused_s = self._trial_s = 0.0
        self._trial = 1

    async def admit(self, scope: Scope) -> Passage | None:
        """The passage of a request that goes to the replicas, once it may; None: it is to be refused as they would."""
        until = time.monotonic() + HOLD_S
        if not self.new:
            self.allowed = MAX_NEW
        may_go = scope.get("method") != "POST" or (not self._waiting and self._has_room())
        # places that are free are those of the ones that wait already: who comes behind them is refused now, not later
        ahead = len(self._waiting) + self._called
        waited, passage = False, None
        try:
            while not self.refuses(scope, ahead=0 if waited else ahead, trial=may_go):
                if may_go or (left := until - time.monotonic()) <= 0:
                    passage = self.passage(scope)
                    break
                await self._turn(_key(scope), left, again=waited)
                waited, may_go = True, self._has_room()
            return passage
        finally:
            if passage is None:  # whoever was called and does not go hands the turn on
                self.wake()

    async def _turn(self, key: bytes, timeout_s: float, *, again: bool) -> None:
        """Wait to be called. again: somebody was quicker when this one was called, who keeps his place."""
        entry: tuple[bytes, asyncio.Future[bool]] = key, asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if again else self._waiting.append)(entry)
        try:
            await asyncio.wait([entry[1]], timeout=timeout_s)
        finally:
            if entry[1].done():
                self._called -= entry[1].result()
            else:
                self._waiting.remove(entry)

    def _has_room(self) -> bool:
        return self.new + self._called < self.allowed

    def wake(self) -> None:
        """Call the next one that waits, if there is room for one."""
        if self._waiting and self._has_room():
            self._called += 1
            self._waiting.popleft()[1].set_result(True)

    def refuses(self, scope: Scope, *, ahead: int = 0, trial: bool = True) -> bool:
        """Whether a request is to be refused without asking a replica.

        ahead: others that go before it. trial: it may be let through as a trial.
        """
        if self._room is None or scope.get("method") != "POST":
            return False
        now = time.monotonic()
        if now > self._refused_s + FORGET_S:
            self._room = None
            self._told.clear()
            return False
        if self.under_way + ahead < self._room or _key(scope) not in self._told:
            return False
        if trial and now >= self._trial_s:
            self._room = self.under_way + self._trial
            self._trial, self._trial_s = min(2 * self._trial, MAX_TRIAL), now + TRIAL_S
            return False
        self._refused_s = now
        return True

    def passage(self, scope: Scope) -> Passage:
        """For a request that goes to the replicas now."""
        return Passage(self, _key(scope), scope.get("method") == "POST")

    def note_full(self, key: bytes) -> None:
        """A replica refused a request with this key, which is no longer counted, because it is full."""
        if len(self._told) >= MAX_KEYS:
            self._told.clear()
        self._told.add(key)
        self._room, self._trial = self.under_way, 1
        self._refused_s = time.monotonic()
        self._trial_s = self._refused_s + TRIAL_S
        self.allowed = MAX_NEW
        told = [entry for entry in self._waiting if entry[0] == key]
        self._waiting = deque(entry for entry in self._waiting if entry[0] != key)
        for _, turn in told:
            turn.set_result(False)


def _key(scope: Scope) -> bytes:
    return next((value for name, value in scope["headers"] if name == b"authorization"), b"")
