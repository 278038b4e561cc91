"""The server-sent events of one request.

Invariant: a stream ends with `data: [DONE]` after its last chunk, or with an error event and no [DONE]. Each event is one
chunk of one choice, and a repeated generation has the same chunks, so the failover proxy can leave out those that its
client has. Used by the generation routes.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tc_ray.serving.errors import RequestError
from tc_ray.serving.http.answers import as_json, error_event
from tc_ray.serving.http.feed import ClientGone, Feed, unless_gone
from tc_ray.serving.http.responses import ResponseBuilder

DONE = "data: [DONE]\n\n"

logger = logging.getLogger(__name__)


class EventStream(Response):
    """The streamed response. Its generations are cancelled however it ends, even before it begins."""

    media_type = "text/event-stream"

    def __init__(self, builder: ResponseBuilder, feed: Feed, *, with_usage: bool, headers: dict[str, str]) -> None:
        self._builder, self._feed, self._with_usage = builder, feed, with_usage
        self._failed: str | None = None
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; stop when the client leaves."""
        state = scope.setdefault("state", {})
        try:
            await unless_gone(receive, self._send(send))
        except (ClientGone, OSError):
            state["gone"] = True
        finally:
            self._feed.cancel()
            if self._failed is not None:
                state["refused"] = self._failed

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._events():
            await send({"type": "http.response.body", "body": line.encode("utf-8"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for chunk in self._builder.chunks(self._feed, self._with_usage):
                yield f"data: {as_json(chunk)}\n\n"
        except RequestError as error:
            self._failed = error.code
            yield error_event(error.envelope())
            return
        except Exception:  # the client must not take a part of the text for the whole
            logger.exception("a stream failed")
            self._failed = "internal_error"
            yield error_event(RequestError("The server failed.", status=500, code=self._failed).envelope())
            return
        yield DONE
