"""Who is let in before anything is read or computed: not over a key's limit, not into a full queue.

Invariant: a refusal costs nothing but itself: no body is read, no prompt tokenised. Added to the app by app.py, behind the
check of the key.
"""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Receive, Scope, Send

from tc_ray.serving.errors import RequestError, queue_full
from tc_ray.serving.models.registry import Catalogue


class Admission:
    """ASGI middleware over the routes that make a model work."""

    def __init__(self, app: ASGIApp, catalogue: Catalogue, max_key_requests: int) -> None:
        self._app = app
        self._catalogue = catalogue
        self._max_key_requests = max_key_requests
        self._under_way: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 429."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = scope.setdefault("state", {}).get("key", b"")
        if len(self._catalogue) and not self._catalogue.has_room():
            await queue_full().answer(scope, receive, send)
            return
        if self._under_way[key] >= self._max_key_requests:
            refusal = RequestError(
                f"{self._max_key_requests} requests of this key are under way already; wait for one to end.",
                status=429,
                code="key_limit",
                retry_after_s=1,
            )
            await refusal.answer(scope, receive, send)
            return
        self._under_way[key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]
