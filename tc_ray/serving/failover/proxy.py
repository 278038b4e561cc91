"""The failover proxy: an ASGI middleware in Ray Serve's proxy process, which outlives the replicas behind it.

When a replica dies, Serve ends its responses without an error; one that hangs answers nothing, not even that it is alive. The failover proxy sends the request to another replica: a
stream is repeated there with the same seed and continued after the last chunk that the client has; a response that had not
begun is made again. What cannot be saved ends in an error event or an error body. It also removes headers that clients must
not set, and puts Serve's plain-text errors into OpenAI's envelope.
Invariant: a stream that has begun ends with `data: [DONE]` or an error event, unless the client has left.
Loaded by Ray Serve through the name that `deploy/launch.py` puts into the environment; nothing of serving imports this.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tc_ray.config.serving import MAX_BODY_BYTES
from tc_ray.serving import wire
from tc_ray.serving.errors import RequestError
from tc_ray.serving.failover.progress import DivergedError, StreamProgress
from tc_ray.serving.wire import prepare_process, read_body, replayed

MAX_HELD_BYTES = 2**28
"""Of all bodies that one proxy holds, for which no key is needed."""
RESUME_HEADER = wire.RESUME_HEADER.lower().encode()
SEED_HEADER = wire.SEED_HEADER.lower().encode()
ALIVE_HEADER = wire.ALIVE_HEADER.lower().encode()
COPILOT_HEADER = wire.COPILOT_HEADER.lower().encode()
FAILOVER_HEADER = (wire.FAILOVER_HEADER.lower().encode(), b"1")
_NOT_FROM_CLIENTS = {
    RESUME_HEADER,
    SEED_HEADER,
    ALIVE_HEADER,
    # Serve's own: they change its time limit, switch off its watch for clients that leave, and choose replicas
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"x-session-id",
    # Serve decodes it and writes it into its log
    b"x-request-id",
}
MAX_RESUMES = 3
"""Of one stream. A request that kills each replica it reaches must not kill them all."""
RESUME_WITHIN_S = 60.0
"""How long a stream waits for a replica with a free place."""
MAX_WAIT_S = 5.0
HUNG_S = 10.0
"""The replica of a stream is taken for dead when it is silent for so long. It gives a sign of life every `wire.ALIVE_S`."""
HEAD_S = 20.0
"""The same before the head of any answer. Serve may have no replica for now: this costs no resume."""
_ALLOWED_ORIGIN = b"access-control-allow-origin"

logger = logging.getLogger("tc_ray.serving")


def middlewares() -> list[Middleware]:
    """Called by Ray Serve's proxy at its start, in its process."""
    prepare_process()
    return [Middleware(FailoverProxy)]


class FailoverProxy:
    """See the module. It keeps each body until its request has ended, to send it again.

    max_body_bytes: of one body, at least the app's own bound. max_held_bytes: of all requests.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int = MAX_BODY_BYTES, max_held_bytes: int = MAX_HELD_BYTES
    ) -> None:
        self._app = app
        self.max_body_bytes, self.max_held_bytes = max_body_bytes, max_held_bytes
        self.held_bytes = 0
        self._origins: set[bytes] = set()
        """Origins that a replica has let read its answers: a browser asks one first, and their pages may read these errors too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] == "/-/healthz":
            await self._app(scope, receive, send)
            return
        held, origin = 0, dict(scope["headers"]).get(b"origin")

        async def watched(message: Message) -> None:
            if origin is not None and message["type"] == "http.response.start":
                self._origins.update(value for name, value in message["headers"] if name == _ALLOWED_ORIGIN)
            await send(message)

        def hold(count: int) -> None:
            nonlocal held
            held += count
            self.held_bytes += count
            if self.held_bytes > self.max_held_bytes:
                message = "The server is receiving too many large bodies."
                raise RequestError(message, status=503, code="unavailable", retry_after_s=1)

        try:
            if scope["path"].startswith("/-/"):  # Serve's list of routes and the like, for which it asks for no key
                raise RequestError("Not Found.", status=404)
            body = await read_body(receive, self.max_body_bytes, hold=hold)
            if body is not None:
                await _Relay(self._app, scope, body, receive, watched).run()
        except RequestError as error:
            readable = next((one for one in (origin, b"*") if one in self._origins), None)
            await send_error(send, error.with_traceback(None), readable)  # without its frames, which hold the body
        finally:
            self.held_bytes -= held


class _Relay:
    """One request, over as many replicas as it takes. Each response is passed on to the client as far as it is valid."""

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        self._app, self._scope, self._body = app, scope, body
        self._client_receive, self._client_send = receive, send
        self._works = scope["method"] == "POST"
        """The answer takes work, so its replica gives signs of life."""
        self._attempts = 0
        """Number of the attempt whose messages count."""
        self._unheard = 0
        """Attempts given up before a head."""
        self._heard_s = 0.0
        """When the replica has last said anything; infinite while the client is slow to take it."""
        self._gone = False
        """The client has left."""
        self._stream: StreamProgress | None = None
        """Set once the client has the head of a stream."""
        self._identity: dict[bytes, bytes] = {}
        """Seed and Copilot version of the first response."""

    async def run(self) -> None:
        """Send the request until it is answered. Raises RequestError where the client has got nothing."""
        resumes, until = 0, time.monotonic() + RESUME_WITHIN_S
        again = False
        while True:
            await self._attempt()
            refusal = self._refusal
            if self._complete or self._gone:
                return
            if self._cut and not self._begun:
                self._unheard += 1
                continue
            if self._stream is None:
                if again or refusal is not None:
                    raise refusal or _replica_ended()
                again = True
                logger.info("a replica ended before it answered; the request is sent to another")
                continue
            if refusal is None:
                resumes, until = resumes + 1, time.monotonic() + RESUME_WITHIN_S
                logger.info("the replica of a stream ended; another one repeats it (repeat %d)", resumes)
            waitable = refusal is None or (refusal.status in (429, 503) and time.monotonic() < until)
            if resumes > MAX_RESUMES or not waitable:
                event = f"data: {json.dumps((refusal or _replica_ended()).envelope())}\n\n".encode()
                await self._client_send({"type": "http.response.body", "body": event, "more_body": False})
                return
            if refusal is not None:
                await asyncio.sleep(min(float(refusal.retry_after_s or 1), MAX_WAIT_S))

    async def _attempt(self) -> None:
        """Send the request to one replica."""
        self._resumed = self._stream is not None
        self._complete = False
        """The client has the whole response."""
        self._refusal: RequestError | None = None
        """An error of the replica or of Serve that needs another form."""
        self._start: Message | None = None
        """Head of a response. It is sent with the first part of the body."""
        self._begun = self._cut = False
        """The head has come; the replica was silent for too long."""
        self._refused = bytearray()
        self._mode: Callable[[Message], Awaitable[None]] | None = None
        """What is done with the parts of the body; None: nothing."""
        # A scope of its own: Serve's middleware adds to the list of headers.
        scope = {**self._scope, "headers": self._headers()}
        self._attempts = number = self._attempts + 1

        async def send(message: Message) -> None:
            if number == self._attempts:  # one that was given up may still speak
                await self._send(message)

        try:
            await self._answered(asyncio.ensure_future(self._app(scope, replayed(self._body, self._receive), send)))
        except Exception:  # whatever it was, the client gets an error; the proxy's log has the traceback
            logger.exception("a request failed in Ray Serve's proxy")
        if self._stream is not None and not self._complete:
            self._stream.repeat()

    async def _answered(self, answering: asyncio.Future[None]) -> None:
        """Wait until the replica has answered, or has been silent for too long."""
        self._heard_s = time.monotonic()
        try:
            while not (await asyncio.wait((answering,), timeout=HUNG_S / 4))[0]:
                limit_s = HUNG_S if self._begun else HEAD_S
                watched = self._stream is not None if self._begun else self._works and self._unheard < MAX_RESUMES
                if watched and time.monotonic() > self._heard_s + limit_s:
                    logger.warning("a replica says nothing for %g s; its request goes to another", limit_s)
                    self._cut = True
                    return
            answering.result()
        finally:
            self._mode = None
            self._attempts += answering.cancel()  # true where it has not ended: nothing more is taken of it
            await asyncio.wait((answering,), timeout=1)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        given = self._scope["headers"]
        headers = [(name, value) for name, value in given if name.replace(b"_", b"-") not in _NOT_FROM_CLIENTS]
        headers += [(ALIVE_HEADER, b"1")]
        if self._stream is not None:
            resume = self._stream.resume_header()
            headers += [(RESUME_HEADER, resume)] if resume else []
            headers += [(SEED_HEADER, self._identity[SEED_HEADER])] if SEED_HEADER in self._identity else []
        return headers

    async def _receive(self) -> Message:
        message = await self._client_receive()
        self._gone = self._gone or message["type"] == "http.disconnect"
        return message

    async def _send(self, message: Message) -> None:
        """Take one message of the replica."""
        self._heard_s = math.inf
        if message["type"] == "http.response.start":
            self._begun = True
            await self._begin(message)
        elif self._mode is not None and not self._complete:
            await self._mode(message)
        self._heard_s = time.monotonic()

    async def _begin(self, start: Message) -> None:
        headers = dict(start["headers"])
        kind, status = headers.get(b"content-type", b""), start["status"]
        self._start = start
        if status == 200 and kind.startswith(b"text/event-stream"):
            named = {name: headers[name] for name in (SEED_HEADER, COPILOT_HEADER) if name in headers}
            if not self._resumed:
                self._identity.update(named)
                self._stream = StreamProgress()
                await self._client_send(_marked(start))
            elif named.get(COPILOT_HEADER) != self._identity.get(COPILOT_HEADER):
                self._refuse("the other replicas have another Copilot by now")
                return
            self._mode = self._pass_on
        elif self._resumed or (status >= 400 and kind.startswith(b"text/plain")):
            self._mode = self._collect
        else:
            self._mode = self._whole

    def _refuse(self, reason: str) -> None:
        """Ignore the rest of a stream that does not continue the one begun."""
        self._mode = None
        self._refusal = RequestError(
            f"The replica of this stream ended, and {reason}. Send it again.", status=500, code="replica_ended"
        )

    async def _pass_on(self, message: Message) -> None:
        """Pass on the events of a stream, and its end only after `[DONE]` or an error event."""
        assert self._stream is not None
        try:
            events = self._stream.take(message.get("body", b""))
        except DivergedError:
            self._refuse("its repeat by another replica came out otherwise")
            return
        if self._stream.ended:
            self._complete = True
            await self._client_send({"type": "http.response.body", "body": events, "more_body": False})
        elif events:
            await self._client_send({"type": "http.response.body", "body": events, "more_body": True})

    async def _whole(self, message: Message) -> None:
        """Pass on a body that is no stream, its head with the first part."""
        if self._start is not None:
            await self._client_send(_marked(self._start))
            self._start = None
        await self._client_send(message)
        self._complete = not message.get("more_body", False)

    async def _collect(self, message: Message) -> None:
        """Collect the body of an error that needs another form."""
        self._refused += message.get("body", b"")
        if not message.get("more_body", False):
            assert self._start is not None
            self._refusal = _refusal(self._start, bytes(self._refused))


def _marked(start: Message) -> Message:
    return {**start, "headers": [*start["headers"], FAILOVER_HEADER]}


def _replica_ended() -> RequestError:
    return RequestError(
        "The replica that worked on this request ended. Send it again.",
        status=503,
        code="replica_ended",
        retry_after_s=1,
    )


def _refusal(start: Message, body: bytes) -> RequestError:
    """The RequestError for an error of a replica (an envelope) or of Serve (plain text, which clients do not see)."""
    status, headers = start["status"], dict(start["headers"])
    after = headers.get(b"retry-after", b"")
    retry_after_s = int(after) if after.isdigit() else (1 if status in (429, 503) else None)
    if headers.get(b"content-type", b"").startswith(b"application/json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            error = json.loads(body)["error"]
            return RequestError(error["message"], status=status, code=error["code"], retry_after_s=retry_after_s)
    if status == 404:
        # Serve knows no application at this path: it is not there yet, or no longer.
        return RequestError("The server is starting or shutting down.", status=503, code="not_ready", retry_after_s=5)
    texts = {
        429: ("The server has too many requests.", "queue_full"),
        503: ("No replica of the server can take the request now.", "unavailable"),
    }
    message, code = texts.get(status, ("The server failed.", "internal_error"))
    return RequestError(message, status=status, code=code, retry_after_s=retry_after_s)


async def send_error(send: Send, error: RequestError, origin: bytes | None = None) -> None:
    """Send an error as a whole response, which pages of `origin` may read."""
    body = json.dumps(error.envelope()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), FAILOVER_HEADER]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    if origin is not None:
        headers += [(_ALLOWED_ORIGIN, origin), (b"access-control-expose-headers", b"Retry-After"), (b"vary", b"Origin")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
