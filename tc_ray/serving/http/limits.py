"""What is refused before a route: no place in any engine, too many requests of one key, a body too long or too slow.

Invariants: a refusal by `Admission` reads no body and tokenises no prompt. Only the engine itself decides whether a request
has a place (`Engine.reserve`); this asks it whether any place is free. The app behind `BodyLimit` never sees more than
`limit_bytes`, whether or not the client states a length; Ray Serve has no such bound, and the failover proxy passes bodies on
as they come. Added to the app by app.py, behind the check of the key.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tc_ray.serving.errors import RequestError, queue_full
from tc_ray.serving.models.registry import ModelRegistry

BODY_TIMEOUT_S = 30.0
LINGER_S = 1.0
LINGER_BYTES = 4 * 2**20
"""A refused body is read for this long and no further, so that a client that is still sending gets to read the response."""


class Admission:
    """ASGI middleware over the routes that make a model work."""

    def __init__(self, app: ASGIApp, registry: ModelRegistry, max_key_requests: int) -> None:
        self._app = app
        self._registry = registry
        self._max_key_requests = max_key_requests
        self._running: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 429."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = scope.setdefault("state", {}).get("key", b"")
        if self._registry.full:
            await queue_full().answer(scope, receive, send)
            return
        if self._running[key] >= self._max_key_requests:
            message = f"{self._max_key_requests} requests of this key are running; wait for one to end."
            error = RequestError(message, status=429, code="key_limit", retry_after_s=1)
            await error.answer(scope, receive, send)
            return
        self._running[key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]


class BodyLimit:
    """ASGI middleware: reads a POST's whole body, answers 413 or 408, or passes it on in one message."""

    def __init__(self, app: ASGIApp, limit_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it and end the connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._timeout_s)
        except RequestError as error:
            # Its traceback's frames hold the body and the error itself: only the garbage collector would free them.
            await _refuse(error.with_traceback(None), scope, receive, send)
            return
        except asyncio.TimeoutError:  # the builtin's alias only from Python 3.11 on
            message = f"The body did not arrive within {self._timeout_s:g} s."
            await _refuse(RequestError(message, status=408, code="body_timeout"), scope, receive, send)
            return
        if body is None:
            return
        taken = False

        async def replay() -> Message:
            nonlocal taken
            if taken:
                return await receive()
            taken = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when the client has left. Raises RequestError 413."""
        too_large = RequestError(
            f"The body is longer than {self._limit_bytes} bytes.", status=413, code="body_too_large"
        )
        if _stated_bytes(scope) > self._limit_bytes:
            raise too_large
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit_bytes:
                raise too_large
        return bytes(body)


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error while a body is still coming, read on for a moment, and end the connection."""
    scope.setdefault("state", {})["refused"] = error.code
    response = error.response()
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discard(receive), LINGER_S)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    seen_bytes, more = 0, True
    while more and seen_bytes < LINGER_BYTES:
        message = await receive()
        seen_bytes += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def _stated_bytes(scope: Scope) -> int:
    """The length that the client states, 0 for none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
