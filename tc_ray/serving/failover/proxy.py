"""The stream guard: an ASGI middleware in Ray Serve's proxy, which outlives the replicas behind it.

Serve ends a response without a word when its replica dies. The guard sends the request again to another replica: a stream
is repeated there with the same seed and goes on after the last chunk that its client has, an answer that had not begun is
made anew. What cannot be saved ends in an error event or an error body. It also bounds bodies, removes headers that are not
a client's business, gives Serve's own plain-text errors OpenAI's envelope, and refuses by itself while the replicas are full
(pressure.py).
Invariant: a stream that has begun ends with `data: [DONE]` or an error event, unless the client has left.
Serve's proxy finds it by `PROXY_CALLBACK_VARIABLE`; launch.py sets that.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tc_ray.serving.body_limit import (
    BODY_TIMEOUT_S,
    bodies_too_many,
    body_late,
    body_too_large,
    refuse_body,
    stated_bytes,
    without_frames,
)
from tc_ray.serving.errors import RequestError, queue_full
from tc_ray.serving.failover.pressure import FULL_HEADER, Passage, Pressure
from tc_ray.serving.failover.progress import DivergedError, StreamProgress
from tc_ray.serving.latency import prepare_process

PROXY_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_CALLBACK = "tc_ray.serving.failover.proxy.middlewares"
MAX_BODY_VARIABLE = "TC_RAY_MAX_BODY_BYTES"
DEFAULT_MAX_BODY_BYTES = 16 * 2**20
"""Where the variable is not set; the app's own, smaller bound then answers first in most cases."""
MAX_HELD_BYTES = 2**28
"""Of all bodies that a proxy holds: a client needs no key to send one."""

RESUME_HEADER = b"x-tc-ray-resume"
SEED_HEADER = b"x-tc-ray-seed"
COPILOT_HEADER = b"x-tc-ray-copilot"
"""Of a response: the version of the Copilot that made it."""
GUARD_HEADER = (b"x-tc-ray-guard", b"1")
"""Of every response that went through the guard: launch.py looks for it."""
_NOT_FROM_CLIENTS = {
    RESUME_HEADER,
    SEED_HEADER,
    # Serve's own: they change its time limit, switch off its watch for clients that leave, and choose replicas
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"x-session-id",
}

MAX_RESUMES = 3
"""Of one stream. A request that ends each replica that takes it must not end them all."""
RESUME_WITHIN_S = 60.0
"""How long a stream waits for a replica with a free place."""
MAX_WAIT_S = 5.0

logger = logging.getLogger("tc_ray.serving")


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy calls at its start, in its process."""
    prepare_process()
    return [Middleware(StreamGuard, max_body_bytes=guarded_body_bytes())]


def guarded_body_bytes() -> int:
    """Longest body that the guard of this machine's proxy lets through."""
    return int(os.environ.get(MAX_BODY_VARIABLE) or DEFAULT_MAX_BODY_BYTES)


class StreamGuard:
    """See the module. The guard holds each body until its request has ended, to send it again.

    Args:
        max_body_bytes: longer bodies are answered with 413. body_timeout_s: those that take longer to arrive with 408.
        max_held_bytes: with 503 when the bodies of all requests under way come to more.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        body_timeout_s: float = BODY_TIMEOUT_S,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._app = app
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s
        self._max_held_bytes, self._held_bytes = max_held_bytes, 0
        self._pressure = Pressure()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] == "/-/healthz":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith("/-/"):
            # Serve's list of routes and the like: no part of this API, and Serve asks for no key.
            await send_error(send, RequestError("Not Found.", status=404))
            return
        body = bytearray()
        try:
            if not await self._taken(scope, receive, send, body):
                return
            passage = await self._pressure.admit(scope)
            if passage is None:
                await send_error(send, queue_full())
                return
            try:
                await _Relay(self._app, scope, body, receive, send, passage).run()
            finally:
                passage.end()
        finally:
            self._held_bytes -= len(body)

    async def _taken(self, scope: Scope, receive: Receive, send: Send, body: bytearray) -> bool:
        """Whether the whole body is there; else the client has left or was told why it is not taken."""
        try:
            return await asyncio.wait_for(self._read(scope, receive, body), self._body_timeout_s)
        except asyncio.TimeoutError:  # the builtin's alias only from Python 3.11 on
            refused = body_late(self._body_timeout_s)
        except RequestError as error:
            refused = without_frames(error)
        self._held_bytes -= len(body)
        body.clear()
        await refuse_body(refused, receive, send, [GUARD_HEADER])
        return False

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Take the body in; False when the client left. Raises RequestError; what is in `body` by then counts as held."""
        if stated_bytes(scope) > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            more = message.get("more_body", False)
            body += part
            self._held_bytes += len(part)
            if len(body) > self._max_body_bytes:
                raise body_too_large(self._max_body_bytes)
            if self._held_bytes > self._max_held_bytes:
                raise bodies_too_many()
        return True


class _Relay:
    """One request, over as many replicas as it takes."""

    def __init__(
        self,
        app: ASGIApp,
        scope: Scope,
        body: bytearray,
        receive: Receive,
        send: Send,
        passage: Passage,
    ) -> None:
        self._app, self._scope, self._body = app, scope, body
        self._client_receive, self._client_send = receive, send
        self._gone, self._passage = False, passage
        self._stream: StreamProgress | None = None
        """Set once the client has the head of a stream."""
        self._identity: dict[bytes, bytes] = {}
        """Seed and Copilot version of the first response."""

    async def run(self) -> None:
        """Send the request until it is answered."""
        resumes, until = 0, time.monotonic() + RESUME_WITHIN_S
        again = False
        while True:
            attempt = await self._attempt()
            if self._gone or attempt.complete:
                return
            if self._stream is None:
                if again or attempt.refusal is not None:
                    await self._give_up(attempt.refusal or _replica_ended())
                    return
                again = True
                logger.info("a replica ended before it answered; the request is sent again")
                continue
            refusal = attempt.refusal
            if refusal is None:
                resumes, until = resumes + 1, time.monotonic() + RESUME_WITHIN_S
                logger.info("a stream's replica ended; it goes on elsewhere (%d)", resumes)
            waitable = refusal is None or (refusal.status in (429, 503) and time.monotonic() < until)
            if resumes > MAX_RESUMES or not waitable:
                await self._give_up(refusal or _replica_ended())
                return
            if refusal is not None:
                await asyncio.sleep(min(float(refusal.retry_after_s or 1), MAX_WAIT_S))

    async def _give_up(self, error: RequestError) -> None:
        if self._stream is None:
            await send_error(self._client_send, error)
            return
        event = f"data: {json.dumps(error.envelope())}\n\n".encode()
        await self._client_send({"type": "http.response.body", "body": event, "more_body": False})

    async def _attempt(self) -> _Attempt:
        attempt = _Attempt(self._client_send, self._stream, self._identity, self._passage)
        handed_over = False

        async def receive() -> Message:
            nonlocal handed_over
            if not handed_over:
                handed_over = True
                return {"type": "http.request", "body": bytes(self._body), "more_body": False}
            message = await self._client_receive()
            if message["type"] == "http.disconnect":
                self._gone = True
            return message

        # A scope of its own: Serve's middleware adds to the list of headers.
        scope = {**self._scope, "headers": self._headers()}
        try:
            await self._app(scope, receive, attempt.send)
        except Exception:  # whatever it was, the client must be told; the proxy's log has it
            logger.exception("a request failed in Ray Serve's proxy")
        self._stream = attempt.stream
        if self._stream is not None and not attempt.complete:
            self._stream.repeat()
        return attempt

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(name, value) for name, value in self._scope["headers"] if _is_clients(name, value)]
        if self._stream is not None:
            resume = self._stream.resume_header()
            headers += [(RESUME_HEADER, resume)] if resume else []
            headers += [(SEED_HEADER, self._identity[SEED_HEADER])] if SEED_HEADER in self._identity else []
        return headers


class _Attempt:
    """One response of one replica: passed on to the client as far as it is sound.

    complete: the client has all of it. refusal: the replica, or Serve, refused what cannot be passed on as it is.
    stream: the stream the client has begun to read, if it is one.
    """

    def __init__(
        self,
        send: Send,
        stream: StreamProgress | None,
        identity: dict[bytes, bytes],
        passage: Passage,
    ) -> None:
        self._send_to_client = send
        self.stream = stream
        self.complete = False
        self.refusal: RequestError | None = None
        self._identity, self._passage = identity, passage
        self._resumed = stream is not None
        self._start: Message | None = None
        """Head of a response that is held back until its body has come."""
        self._refused = bytearray()
        self._mode: Callable[[Message], Awaitable[None]] = self._wait

    async def send(self, message: Message) -> None:
        """Take one message of the replica."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and not self.complete:
            await self._mode(message)

    async def _begin(self, start: Message) -> None:
        headers = dict(start["headers"])
        kind, status = headers.get(b"content-type", b""), start["status"]
        self._passage.answered()
        if status == 429 and FULL_HEADER in headers:
            self._passage.full()
        self._start = start
        if status == 200 and kind.startswith(b"text/event-stream"):
            named = {name: headers[name] for name in (SEED_HEADER, COPILOT_HEADER) if name in headers}
            if not self._resumed:
                self._identity.update(named)
                self.stream = StreamProgress()
                await self._send_to_client(_marked(start))
            elif named.get(COPILOT_HEADER) != self._identity.get(COPILOT_HEADER):
                self._refuse("the others have another Copilot by now")
                return
            self._mode = self._pass_on
        elif self._resumed or (status >= 400 and kind.startswith(b"text/plain")):
            self._mode = self._collect
        else:
            self._mode = self._whole

    async def _wait(self, _: Message) -> None:
        raise RuntimeError("a response body came before its head")

    def _refuse(self, reason: str) -> None:
        """Take no more of a stream that does not continue the one begun."""
        self._mode = self._ignore
        self.refusal = RequestError(
            f"The replica of this stream ended, and {reason}. Send it again.", status=500, code="replica_ended"
        )

    async def _ignore(self, _: Message) -> None:
        """Of a stream that is not wanted."""

    async def _pass_on(self, message: Message) -> None:
        """Events of a stream. Its end is passed on only when it was said."""
        assert self.stream is not None
        try:
            events = self.stream.take(message.get("body", b""))
        except DivergedError:
            self._refuse("its repeat by another came out otherwise")
            return
        if self.stream.ended:
            self.complete = True
            await self._send_to_client({"type": "http.response.body", "body": events, "more_body": False})
        elif events:
            await self._send_to_client({"type": "http.response.body", "body": events, "more_body": True})

    async def _whole(self, message: Message) -> None:
        """A body that is no stream; its head goes with its first part."""
        if self._start is not None:
            await self._send_to_client(_marked(self._start))
            self._start = None
        await self._send_to_client(message)
        self.complete = not message.get("more_body", False)

    async def _collect(self, message: Message) -> None:
        """An error that must be told in another form."""
        self._refused += message.get("body", b"")
        if not message.get("more_body", False):
            assert self._start is not None
            self.refusal = _refusal(self._start, bytes(self._refused))


def _is_clients(name: bytes, value: bytes) -> bool:
    if name == b"x-request-id":
        # Serve decodes it and writes it into its log
        return len(value) <= 128 and value.replace(b"-", b"").replace(b"_", b"").isalnum()
    return name.replace(b"_", b"-") not in _NOT_FROM_CLIENTS


def _marked(start: Message) -> Message:
    """A response's head with the guard's mark; Serve adds a request id beside the app's, which is the same."""
    headers = dict.fromkeys((*start["headers"], GUARD_HEADER))
    return {**start, "headers": list(headers)}


def _replica_ended() -> RequestError:
    return RequestError(
        "The replica that worked on this request ended. Send it again.",
        status=503,
        code="replica_ended",
        retry_after_s=1,
    )


def _refusal(start: Message, body: bytes) -> RequestError:
    """The RequestError for a refusal of a replica (an envelope) or of Serve (plain text, which is not repeated)."""
    status, headers = start["status"], dict(start["headers"])
    after = headers.get(b"retry-after", b"")
    retry_after_s = int(after) if after.isdigit() else (1 if status in (429, 503) else None)
    told: Any = None
    if headers.get(b"content-type", b"").startswith(b"application/json"):
        try:
            told = json.loads(body).get("error")
        except (ValueError, AttributeError):
            told = None
    if isinstance(told, dict):
        return RequestError(str(told.get("message")), status=status, code=told.get("code"), retry_after_s=retry_after_s)
    if status == 404:
        # Serve knows no application at this path: it is not there yet, or not any more.
        return RequestError(
            "The server starts or shuts down.", status=503, code="not_ready", retry_after_s=retry_after_s or 5
        )
    texts = {
        408: ("The request took longer than the server allows.", "deadline_exceeded"),
        429: ("The server has too many requests.", "queue_full"),
        503: ("No replica of the server can take the request now.", "unavailable"),
    }
    message, code = texts.get(status, ("The server failed.", "internal_error"))
    return RequestError(message, status=status, code=code, retry_after_s=retry_after_s)


async def send_error(send: Send, error: RequestError) -> None:
    """Send an error as a whole response."""
    body = json.dumps(error.envelope()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), GUARD_HEADER]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
