"""Request bodies, bounded in size and time. Read by the app's gate (http/) and by the failover proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive

from tc_ray.serving.errors import RequestError

BODY_TIMEOUT_S = 30.0


async def read_body(
    receive: Receive, limit_bytes: int, timeout_s: float = BODY_TIMEOUT_S, hold: Callable[[int], None] | None = None
) -> bytes | None:
    """The whole body; None when the client has left.

    hold: called with the bytes of each part. Raises RequestError 413 or 408, and what `hold` raises.
    """

    async def read() -> bytes | None:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            if hold is not None:
                hold(len(part))
            if len(body) + len(part) > limit_bytes:
                raise RequestError(f"The body is longer than {limit_bytes} bytes.", status=413, code="body_too_large")
            body += part
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), timeout_s)
    except asyncio.TimeoutError:  # the builtin's alias only from Python 3.11 on
        message = f"The body did not arrive within {timeout_s:g} s."
        raise RequestError(message, status=408, code="body_timeout") from None


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one message, then what the client sends."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
