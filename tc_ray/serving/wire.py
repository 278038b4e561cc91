"""What replicas and the failover proxy share: names of headers, bounded request bodies, short pauses of their event loops.

Invariant: the failover proxy removes RESUME, SEED and ALIVE from what clients send, so a replica that is reached through it can
trust them.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable

from starlette.types import Message, Receive

from tc_ray.serving.errors import RequestError

RESUME_HEADER = "X-TC-Ray-Resume"
"""Request: id and time of the stream that this request repeats."""
SEED_HEADER = "X-TC-Ray-Seed"
"""Request and response: seed of the sampling."""
ALIVE_HEADER = "X-TC-Ray-Alive"
"""Request: the failover proxy wants a sign of life from an answer that has nothing to send for ALIVE_S."""
ALIVE_S = 2.0
ALIVE_EVENT: Message = {"type": "http.response.body", "body": b":\n\n", "more_body": True}
"""That of a stream, an empty comment."""
ALIVE_MESSAGE: Message = {"type": "tc_ray.alive"}
"""That of another answer, before its head. ASGI has no such message; Serve passes it on, and the failover proxy keeps it."""
COPILOT_HEADER = "X-TC-Ray-Copilot"
"""Response: version of the Copilot that made it."""
FAILOVER_HEADER = "X-TC-Ray-Failover"
"""Response: it went through the failover proxy. `deploy/launch.py` warns where it is missing."""
BODY_TIMEOUT_S = 30.0
SWITCH_S = 0.0005
"""The interpreter's lock changes hands after so long, not after 5 ms: a request passes through the event loops a dozen
times, and each time would wait that long for another thread (the engine's, or Serve's router)."""


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


def prepare_process() -> None:
    """Shorten the turns of threads, and exempt all present objects from the garbage collector.

    Modules are never freed, and scanning those of Ray or torch stops every thread for 50 to 150 ms, every few seconds under
    load. Objects that are made later, models too, are collected as usual.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
