"""A bound on the request body, for Ray Serve has none: on its length and on the time it takes to arrive.

Invariant: the app behind it never sees more than `limit_bytes`, whether or not the client states a length, and no body
holds a place for longer than BODY_TIMEOUT_S. Added to the app by app.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tc_ray.serving.errors import RequestError

BODY_TIMEOUT_S = 30.0
LINGER_S = 1.0
LINGER_BYTES = 4 * 2**20
"""A refused body is read on for so long, so that a client in the middle of sending it gets to read the answer."""


class BodyLimit:
    """ASGI middleware: takes a POST's whole body in, answers 413 or 408, else hands it on in one message."""

    def __init__(self, app: ASGIApp, limit_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it and end the connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if stated_bytes(scope) > self._limit_bytes:
            await self._refuse(body_too_large(self._limit_bytes), scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._timeout_s)
        except RequestError as error:
            await self._refuse(without_frames(error), scope, receive, send)
            return
        except asyncio.TimeoutError:  # the builtin's alias only from Python 3.11 on
            await self._refuse(body_late(self._timeout_s), scope, receive, send)
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

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None when the client has gone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limit_bytes:
                raise body_too_large(self._limit_bytes)
            if not message.get("more_body", False):
                return bytes(body)

    async def _refuse(self, error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["refused"] = error.code
        await refuse_body(error, receive, send)


async def refuse_body(
    error: RequestError, receive: Receive, send: Send, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with an error while a body is still coming, read on for a moment, and end the connection."""
    response = error.response()
    told = [*response.raw_headers, (b"connection", b"close"), *headers]
    await send({"type": "http.response.start", "status": error.status, "headers": told})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discard(receive), LINGER_S)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def without_frames(error: RequestError) -> RequestError:
    """The error without its traceback, whose frames hold the body, and itself: only the garbage collector would free them."""
    return error.with_traceback(None)


def body_too_large(limit_bytes: int) -> RequestError:
    """413."""
    return RequestError(f"The body is longer than {limit_bytes} bytes.", status=413, code="body_too_large")


def bodies_too_many() -> RequestError:
    """503: those of all requests under way together."""
    text = "The bodies of the requests under way are too much for this server."
    return RequestError(text, status=503, code="unavailable", retry_after_s=1)


def body_late(timeout_s: float) -> RequestError:
    """408."""
    return RequestError(f"The body did not arrive within {timeout_s:g} s.", status=408, code="body_timeout")


async def _discard(receive: Receive) -> None:
    """Read and forget."""
    seen_bytes, more = 0, True
    while more and seen_bytes < LINGER_BYTES:
        message = await receive()
        seen_bytes += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def stated_bytes(scope: Scope) -> int:
    """The length that the client states, 0 for none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
