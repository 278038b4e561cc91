"""How far a stream of server-sent events has got, and how another replica's repeat is joined to what the client has.

A repeat has the same seed, id and time, so its chunks are the same. Rounding differs from batch to batch, so a tie between
two tokens can still be decided differently.
Invariant: `take` returns whole events that the client does not have, and only after the repeat has reproduced those that
it has: texts of two generations are never joined.
"""

from __future__ import annotations

import json
import re
import zlib

_DONE = b"data: [DONE]"
_ERROR = b'data: {"error"'
_INDEX = re.compile(rb'"index": ?(\d+)')
"""A choice's index. Text of the model cannot match: its quotes are escaped inside a JSON string."""
_LOGPROBS = b'"logprobs":'
"""Log-probabilities and explanations come after the text; they may differ in their last digits."""


class DivergedError(Exception):
    """A repeated stream is not the one that was begun."""


class StreamProgress:
    """Follows one stream and its repeats. ended: `[DONE]` or an error event has come."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.created: int | None = None
        self.ended = False
        self._sent: dict[bytes, tuple[int, int]] = {}
        """Per choice: number of chunks that the client has, and their checksum."""
        self._owed: dict[bytes, tuple[int, int]] = {}
        """What a repeat must reproduce before it adds anything."""
        self._repeated: dict[bytes, tuple[int, int]] = {}
        self._rest = b""

    def take(self, body: bytes) -> bytes:
        """The events in `body` that the client does not have. An incomplete event is kept for the next call.

        Raises DivergedError when a repeat differs from what the client has.
        """
        if self._rest:
            body, self._rest = self._rest + body, b""
        if not body.endswith(b"\n\n"):
            whole = body.rfind(b"\n\n") + 2 if b"\n\n" in body else 0
            body, self._rest = body[:whole], body[whole:]
        events = [event for event in body.split(b"\n\n")[:-1] if event != b":"]  # a sign of life is for the proxy
        if not self._owed:
            for event in events:
                self._count(event)
            return b"".join(event + b"\n\n" for event in events)
        return b"".join(event + b"\n\n" for event in events if not self._found_again(event))

    def repeat(self) -> None:
        """The stream broke off and a repeat begins, which must first reproduce what the client has."""
        self._rest = b""
        self._owed, self._repeated = dict(self._sent), {}

    def resume_header(self) -> bytes | None:
        """Value of X-TC-Ray-Resume, which gives a repeat the same chunks; None while the client has none."""
        return None if self.id is None else json.dumps({"id": self.id, "created": self.created}).encode()

    def _count(self, event: bytes) -> None:
        if event.startswith((_DONE, _ERROR)):
            self.ended = True
            return
        if not event.startswith(b"data: {"):
            return  # a comment, as some servers send to keep a connection open
        if self.id is None:
            chunk = json.loads(event[len(b"data: ") :])
            self.id, self.created = str(chunk.get("id")), chunk.get("created")
        key = _choice(event)
        self._sent[key] = _added(self._sent.get(key), event)

    def _found_again(self, event: bytes) -> bool:
        """Whether the client has this event of a repeat. A new event is counted."""
        if event.startswith(_DONE):
            if self._owed:
                raise DivergedError  # it ended earlier
        elif event.startswith(b"data: {") and not event.startswith(_ERROR):
            key = _choice(event)
            if key in self._owed:
                self._repeated[key] = _added(self._repeated.get(key), event)
                count, _ = self._repeated[key]
                if count == self._owed[key][0] and self._repeated[key] != self._owed.pop(key):
                    raise DivergedError
                return True
        self._count(event)
        return False


def _choice(event: bytes) -> bytes:
    """Index of a chunk's choice; empty for the chunk with the token counts."""
    found = _INDEX.search(event)
    return found[1] if found else b""


def _added(sum_: tuple[int, int] | None, event: bytes) -> tuple[int, int]:
    count, checksum = sum_ or (0, 0)
    return count + 1, zlib.crc32(event.partition(_LOGPROBS)[0], checksum)
