"""What a request passes before the routes: metrics, its key, a free place, and its body's bounds. One ASGI middleware.

Invariants: a request to the API without a valid key, or without a free place, is refused before its body is read. No route
sees more than `max_body_bytes`; Ray Serve has no such bound. Only the engine itself decides whether a request has a place; this
asks it whether any is free.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tc_ray.config.serving import ServingSection
from tc_ray.serving.errors import RequestError, queue_full
from tc_ray.serving.http.metrics import GONE, Metrics
from tc_ray.serving.models.registry import ModelRegistry
from tc_ray.serving.wire import BODY_TIMEOUT_S, read_body, replayed

ROUTES = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/models", "/health"})


class Gate:
    """Counts and times each request, and answers 401, 429, 415, 413 or 408 in place of the app.

    key_digests: SHA-256 of the API keys; none: no key is asked for. The scope's state gets `began_s` (perf_counter) and
    `key`, the digest, and `send` for signs of life; the app sets `model`, `refused` (error code) and `gone` (the client has left) for the metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: ModelRegistry,
        limits: ServingSection,
        key_digests: Sequence[bytes],
        metrics: Metrics,
        timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self._app, self._registry, self._limits, self._metrics = app, registry, limits, metrics
        self._digests, self._timeout_s = tuple(key_digests), timeout_s
        self._running: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["began_s"] = began_s = time.perf_counter()
        status = GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state["send"] = watched
        try:
            await self._pass(scope, receive, watched)
        except RequestError as error:
            state["refused"] = error.code
            # Its traceback's frames hold the body and the error itself: only the garbage collector would free them.
            await error.with_traceback(None).response()(scope, receive, watched)
        except Exception:
            status = 500  # an outer middleware answers
            raise
        finally:
            del state["send"]  # it leads back to the scope
            status = GONE if state.get("gone") else status
            route = scope["path"] if scope["path"] in ROUTES else "other"
            seconds = time.perf_counter() - began_s
            self._metrics.answered(route, state.get("model", ""), status, seconds, state.get("refused"))

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["key"] = key = self._key_of(scope)
        if scope["method"] == "HEAD":  # the HTTP server leaves out the body
            scope = {**scope, "method": "GET"}
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in scope["headers"]):
            message = "A body must be sent as it is, without Content-Encoding."
            raise RequestError(message, status=415, code="unsupported_encoding")
        if self._registry.full:
            raise queue_full()
        if self._running[key] >= self._limits.max_key_requests:
            message = f"{self._limits.max_key_requests} requests of this key are running; wait for one to end."
            raise RequestError(message, status=429, code="key_limit", retry_after_s=1)
        self._running[key] += 1
        try:
            body = await read_body(receive, self._limits.max_body_bytes, self._timeout_s)
            if body is not None:
                await self._app(scope, replayed(body, receive), send)
        finally:
            self._running[key] -= 1

    def _key_of(self, scope: Scope) -> bytes:
        """Digest of the request's key, empty where none is asked for. The page's files hold no secret. Raises RequestError 401."""
        if not self._digests or scope["path"] in ("/", "/health") or scope["path"].startswith("/page/"):
            return b""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) == 1:
            scheme, _, key = given[0].partition(b" ")
            sent = hashlib.sha256(key.strip()).digest()
            # All are compared, so that the time does not show which one matched.
            matches = [hmac.compare_digest(sent, known) for known in self._digests]
            if any(matches) and scheme.lower() == b"bearer":
                return sent
        message = "A valid API key is needed: Authorization: Bearer KEY."
        raise RequestError(message, status=401, code="invalid_api_key")
