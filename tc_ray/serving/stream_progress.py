"""How far a stream of server-sent events has got: what the stream guard must know to continue it elsewhere.

Invariant: what `take` returns are whole events, and exactly those are counted, so a stream that breaks off can be taken
up after the last event its client has. Used by guard.py, once for each stream.
"""

from __future__ import annotations

import json
import re
from typing import Any

_DONE = b"data: [DONE]"
_ERROR = b'data: {"error"'
_INDEX = re.compile(rb'"index": ?(\d+)')
"""A choice's index. Inside a JSON string its quotes would be escaped, so text that looks like one is not taken for it."""
USAGE = "usage"
"""Key in `sent` of chunks without a choice."""


class StreamProgress:
    """Counts the events of one stream.

    Attributes: id, created: of the first chunk, None before it. sent: choice index (as text) -> chunks of it that the
    client has. ended: the stream has said that it is over, by `[DONE]` or an error.
    """

    def __init__(self) -> None:
        self.id: str | None = None
        self.created: int | None = None
        self.sent: dict[str, int] = {}
        self.ended = False
        self._rest = b""

    def take(self, body: bytes) -> bytes:
        """The whole events in what has come; the beginning of another one is kept for the next call."""
        if self._rest:
            body, self._rest = self._rest + body, b""
        if not body.endswith(b"\n\n"):
            whole = body.rfind(b"\n\n") + 2 if b"\n\n" in body else 0
            body, self._rest = body[:whole], body[whole:]
        for event in body.split(b"\n\n")[:-1]:
            self._count(event)
        return body

    def restart(self) -> None:
        """Forget the half event of a stream that broke off."""
        self._rest = b""

    def resume_header(self) -> bytes | None:
        """Value of X-TC-Ray-Resume; None while the client has no chunk."""
        if self.id is None:
            return None
        value: dict[str, Any] = {"id": self.id, "created": self.created, "sent": self.sent}
        return json.dumps(value).encode("ascii")

    def _count(self, event: bytes) -> None:
        if event.startswith((_DONE, _ERROR)):
            self.ended = True
            return
        if not event.startswith(b"data: {"):
            return  # a comment, as some servers send to keep a connection open
        if self.id is None:
            chunk = json.loads(event[len(b"data: ") :])
            self.id, self.created = str(chunk.get("id")), chunk.get("created")
        found = _INDEX.search(event)
        key = found[1].decode("ascii") if found else USAGE
        self.sent[key] = self.sent.get(key, 0) + 1
