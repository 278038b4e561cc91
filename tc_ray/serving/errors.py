"""Errors of serving, and how a client sees them: OpenAI's error envelope, which names the field at fault.

Invariant: every error body of the server is `{"error": {message, type, param, code}}`, and no message repeats what the
client sent except the (shortened) name of a field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse

MAX_MESSAGE_CHARACTERS = 500
UNION_TAGS = frozenset({"(text)", "(texts)", "(parts)", "(ids)", "(id lists)", "(list)"})
"""Tags that http/requests.py gives the members of its unions. They are no part of a field's name."""
PYDANTIC_WORDS = frozenset({"[key]", "constrained-str", "bool", "int", "float"})
"""What pydantic itself adds: the key of a mapping, a member of a union without tags."""


class ServingError(RuntimeError):
    """The server cannot start. The message is one line that says why and what to do."""


@dataclass(eq=False)
class RequestError(Exception):
    """A request is refused or failed.

    message: one sentence for the client. param: the field at fault, as the client wrote it. code: a stable word for programs.
    retry_after_s: value of the Retry-After header, in seconds.
    """

    message: str
    _: KW_ONLY
    status: int = 400
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that belong to this error."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def envelope(self) -> dict[str, Any]:
        """The JSON body of this error."""
        others = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, others)
        param = None if self.param is None else _shortened(self.param)
        return {"error": {"message": _shortened(self.message), "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """This error as an HTTP response."""
        return JSONResponse(self.envelope(), self.status, self.headers)


def queue_full() -> RequestError:
    """429: every place in the batch and in the queue is taken."""
    return RequestError(
        "Too many requests run or wait already; try again later.", status=429, code="queue_full", retry_after_s=1
    )


def shutting_down() -> RequestError:
    """503: the engine takes no more requests."""
    return RequestError("The server is shutting down.", status=503, code="shutting_down", retry_after_s=1)


def invalid_value(param: str, reason: str) -> RequestError:
    """400 for a field whose value cannot be used."""
    return RequestError(f"Field `{param}`: {reason}.", param=param, code="invalid_value")


def contradiction(param: str, reason: str) -> PydanticCustomError:
    """The error that a pydantic validator raises where a field contradicts others."""
    return PydanticCustomError("contradiction", "{reason}", {"param": param, "reason": reason})


def from_validation(errors: Sequence[Mapping[str, Any]], instead: Mapping[str, str]) -> RequestError:
    """The RequestError for what FastAPI found in a request. It names the first error only.

    instead: of a field that is taken at a neutral value only, what to send.
    """
    first = errors[0]
    kind, (place, *location), param = first["type"], first["loc"], first.get("ctx", {}).get("param")
    if kind == "json_invalid" and place == "body":
        return RequestError("The body is not valid JSON.", code="invalid_json")
    if not location and param is None:
        return RequestError(
            "The body must be a JSON object, sent with Content-Type: application/json.", code="invalid_body"
        )
    param = param or field_name(location[:1] if place == "header" else location)
    if kind == "missing":
        return RequestError(f"Field `{param}` is required.", param=param, code="missing_field")
    if kind == "extra_forbidden":
        return RequestError(f"Field `{param}` is not supported by this server.", param=param, code="unsupported_field")
    for part in location:
        if part in instead:
            return RequestError(f"Field `{param}`: {instead[part]}.", param=param, code="unsupported_value")
    return invalid_value(param, first["msg"].removeprefix("Value error, "))


def field_name(location: Sequence[str | int]) -> str:
    """A pydantic location as a client writes it: ("messages", 0, "content") is `messages[0].content`."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part not in UNION_TAGS | PYDANTIC_WORDS:
            name += f".{part}" if name else part
    return name


def _shortened(text: str) -> str:
    """`text` cut to the length of an error message, without characters that have no UTF-8."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[: MAX_MESSAGE_CHARACTERS - 3] + "..."
