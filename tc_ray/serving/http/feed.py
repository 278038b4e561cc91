"""The engine's events on their way from its thread to the event loop, and what cancels them early.

Invariant: however a response ends (done, failed, client gone, task cancelled), every engine request behind it is cancelled.
Used by the routes and streams, one feed per request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from tc_ray.serving.engine import Event, Failed, Piece, Request, Reservation
from tc_ray.serving.errors import RequestError

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection."""


class Feed:
    """Submits engine requests and receives their events in the event loop that made it.

    on_first_token: called at the first piece of any. Raises what `Reservation.submit` raises.
    """

    def __init__(
        self, reservation: Reservation, requests: Sequence[Request], on_first_token: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._unfinished = len(requests)
        self._on_first_token: Callable[[], None] | None = on_first_token
        self._handles = reservation.submit(requests, self._deliver)

    def _deliver(self, place: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event with the index of its request, until all have ended. Raises RequestError for the first failure."""
        while self._unfinished:
            place, event = await self._events.get()
            if isinstance(event, Failed):
                retry_after_s = 1 if event.status in (429, 503) else None
                raise RequestError(event.message, status=event.status, code=event.code, retry_after_s=retry_after_s)
            if not isinstance(event, Piece):
                self._unfinished -= 1
            elif self._on_first_token is not None:
                self._on_first_token()
                self._on_first_token = None
            yield place, event

    def cancel(self) -> None:
        """Stop every request that has not ended."""
        for handle in self._handles:
            handle.cancel()


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
