"""The engine's events on their way to the client: from its thread to the event loop, and out as a response or a stream.

Invariants: however a response ends (done, failed, client gone, task cancelled), every engine request behind it is cancelled.
A stream ends with `data: [DONE]` after its last chunk, or with an error event and no [DONE].
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tc_ray.serving.engine.contract import Event, Piece, RequestHandle
from tc_ray.serving.engine.contract import Request as EngineRequest
from tc_ray.serving.errors import RequestError
from tc_ray.serving.http.answers import as_json
from tc_ray.serving.http.metrics import GONE
from tc_ray.serving.wire import ALIVE_EVENT, ALIVE_MESSAGE

Result = TypeVar("Result")
Submit = Callable[[Sequence[EngineRequest], Callable[[int, Event], None]], list[RequestHandle]]
"""Queues requests; calls the second argument with the index of a request and an event of it."""

logger = logging.getLogger(__name__)


class Feed:
    """Submits engine requests and receives their events in the event loop that made it.

    on_first_token: called at the first piece of any. submit: `Engine.submit`; Feed raises what it raises.
    """

    def __init__(self, submit: Submit, requests: Sequence[EngineRequest], on_first_token: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._unfinished = len(requests)
        self._on_first_token: Callable[[], None] | None = on_first_token
        self._handles = submit(requests, self._deliver)

    def _deliver(self, place: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event with the index of its request, until all have ended. Raises RequestError for the first failure."""
        while self._unfinished:
            place, event = await self._events.get()
            if isinstance(event, RequestError):
                raise event
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


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`, which is cancelled when the client closes its connection; None then."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _with_signs(coming: Awaitable[Result], alive_s: float | None, send: Send, sign: Message) -> Result:
    """The result of `coming`; until it is there, `sign` every `alive_s` (see `wire.ALIVE_HEADER`; None: never)."""
    task = asyncio.ensure_future(coming)
    try:
        while alive_s is not None and not (await asyncio.wait((task,), timeout=alive_s))[0]:
            await send(sign)
        return await task
    finally:
        task.cancel()


async def whole(
    request: Request,
    feed: Feed,
    answer: Coroutine[Any, Any, BaseModel],
    headers: Mapping[str, str],
    alive_s: float | None,
) -> Response:
    """A response that is sent when it is complete, after signs of life every `alive_s`."""
    try:
        work = _with_signs(answer, alive_s, request.state.send, ALIVE_MESSAGE)
        found = await _unless_gone(request.receive, work)
        request.state.gone = found is None
        return Response(status_code=GONE) if found is None else json_response(found, headers)
    finally:
        feed.cancel()


def json_response(answer: BaseModel, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A body of answers.py as a response."""
    return Response(as_json(answer), status, headers, "application/json")


class EventStream(Response):
    """The streamed response. Its generations are cancelled however it ends, even before it begins.

    alive_s: see `_with_signs`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, feed: Feed, chunks: AsyncIterator[BaseModel], headers: Mapping[str, str], alive_s: float | None
    ) -> None:
        self._feed, self._chunks, self._alive_s = feed, chunks, alive_s
        self._failed: str | None = None
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; stop when the client leaves."""
        state = scope.setdefault("state", {})
        try:
            state["gone"] = await _unless_gone(receive, self._send(send)) is None
        except OSError:
            state["gone"] = True
        finally:
            self._feed.cancel()
            if self._failed is not None:
                state["refused"] = self._failed

    async def _send(self, send: Send) -> bool:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        events = self._events()
        while line := await _with_signs(anext(events, ""), self._alive_s, send, ALIVE_EVENT):
            await send({"type": "http.response.body", "body": line.encode("utf-8"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for chunk in self._chunks:
                yield f"data: {as_json(chunk)}\n\n"
            yield "data: [DONE]\n\n"
            return
        except RequestError as error:
            failure = error
        except Exception:  # the client must not take a part of the text for the whole
            logger.exception("a stream failed")
            failure = RequestError("The server failed.", status=500, code="internal_error")
        self._failed = failure.code
        yield f"data: {json.dumps(failure.envelope())}\n\n"
