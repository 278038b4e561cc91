"""Admission: no request over its key's limit, none while every engine is full.

Invariant: such a refusal reads no body and tokenises no prompt. Only the engine itself decides whether a request has a place
(`Engine.reserve`); this asks it whether any place is free. Added to the app by app.py, behind the check of the key.
"""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send

from tc_ray.serving.errors import RequestError, queue_full
from tc_ray.serving.models.registry import ModelRegistry


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
