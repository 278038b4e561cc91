"""Server-sent events of one request, and how a stream is repeated that another replica began.

Invariant: a stream ends with `data: [DONE]` after its last chunk, or with an error event and no [DONE]. Each event is one
chunk of one choice, and a repeat has the same chunks, so that the stream guard can leave out those that a client has.
Used by the generation routes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tc_ray.serving.errors import RequestError, invalid_value
from tc_ray.serving.http.answers import as_json, error_event
from tc_ray.serving.http.assembly import Assembly
from tc_ray.serving.http.feed import ClientGone, Feed, unless_gone
from tc_ray.serving.http.shapes import Shape

RESUME_HEADER = "X-TC-Ray-Resume"
SEED_HEADER = "X-TC-Ray-Seed"
COPILOT_HEADER = "X-TC-Ray-Copilot"
DONE = "data: [DONE]\n\n"
_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resume:
    """Id and time of a stream that broke off, for a repeat whose chunks are the same; None: a new one."""

    id: str | None = None
    created: int | None = None

    @staticmethod
    def from_header(value: str | None) -> Resume:
        """From X-TC-Ray-Resume, which the stream guard makes; all is new without it. Raises RequestError."""
        if value is None:
            return Resume()
        try:
            told = json.loads(value)
            resume = Resume(told["id"], told["created"])
            sound = bool(_ID.fullmatch(resume.id or "")) and isinstance(resume.created, int)
        except (ValueError, TypeError, KeyError, RecursionError):
            sound = False
        if not sound:
            raise invalid_value(RESUME_HEADER, "it is not what the stream guard sends; clients must not send it")
        return resume


class EventStream(Response):
    """The response. Its generations are cancelled however it ends, begun or not."""

    media_type = "text/event-stream"

    def __init__(
        self,
        assembly: Assembly,
        feed: Feed,
        shape: Shape,
        *,
        with_usage: bool,
        headers: dict[str, str],
    ) -> None:
        self._assembly, self._feed, self._shape = assembly, feed, shape
        self._with_usage = with_usage
        self._failed: str | None = None
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; stop when the client goes away."""
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
        async for line in self._lines():
            await send({"type": "http.response.body", "body": line.encode("utf-8"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for chunk in self._chunks():
                yield f"data: {as_json(chunk)}\n\n"
        except RequestError as error:
            self._failed = error.code
            yield error_event(error.envelope())
            return
        except Exception:  # whatever it was, the client must not take the rest for the whole
            logger.exception("a stream failed")
            self._failed = "internal_error"
            yield error_event(RequestError("The server failed.", status=500, code=self._failed).envelope())
            return
        yield DONE

    async def _chunks(self) -> AsyncIterator[BaseModel]:
        shape = self._shape
        for index in range(self._assembly.plan.choices):
            opening = shape.opening(index)
            if opening is not None:
                yield opening
        async for index, part, reason in self._assembly.parts(self._feed):
            yield shape.part(index, part) if reason is None else shape.closing(index, part, reason)
        if self._with_usage:
            yield shape.usage(self._assembly.ends)
