"""Events of engine requests, handed from the engine's thread to the event loop, and what ends them early.

Invariant: however a response ends (done, failed, the client gone, the task cancelled), every request behind it is
cancelled, so that nothing is generated for nobody. Used by the routes and streams, once a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from tc_ray.serving.engine import Engine, Event, Failed, Piece, Request
from tc_ray.serving.errors import RequestError

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection: nobody reads an answer."""


class Feed:
    """Submits requests, all or none, and receives their events in the event loop that made it.

    on_first_token: called at the first piece of any. Raises what `Engine.submit` raises.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], on_first_token: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._under_way = len(requests)
        self._on_first_token: Callable[[], None] | None = on_first_token
        self.tickets = engine.submit(requests, self._deliver) if requests else []

    def _deliver(self, place: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event with the place of its request, until all have ended. Raises RequestError for the first that failed."""
        while self._under_way:
            place, event = await self._events.get()
            if isinstance(event, Failed):
                raise failure(event)
            if not isinstance(event, Piece):
                self._under_way -= 1
            elif self._on_first_token is not None:
                self._on_first_token()
                self._on_first_token = None
            yield place, event

    def cancel(self) -> None:
        """Stop all that is under way."""
        for ticket in self.tickets:
            ticket.cancel()


def failure(event: Failed) -> RequestError:
    """What a client is told."""
    retry_after_s = 1 if event.status in (429, 503) else None
    return RequestError(event.message, status=event.status, code=event.code, retry_after_s=retry_after_s)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client closes its connection. Raises ClientGone."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
