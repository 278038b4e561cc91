"""A bound on the request body, for Ray Serve has none.

Invariant: the app behind it never sees more than `limit_bytes`, whether or not the client states a length.
Added to the app by app.py.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tc_ray.serving.errors import RequestError


class BodyLimit:
    """ASGI middleware: takes the whole body in, answers 413 when it is too long, else hands it on in one message."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit_bytes:
                error = RequestError(
                    f"The body is longer than {self._limit_bytes} bytes.", status=413, code="body_too_large"
                )
                await JSONResponse(error.envelope(), error.status)(scope, receive, send)
                return
        taken = False

        async def replay() -> Message:
            nonlocal taken
            if taken:
                return await receive()
            taken = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)
