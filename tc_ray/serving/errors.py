"""What can go wrong while serving, and how a client is told: OpenAI's error envelope, always naming the field.

Invariant: every error body of the server is `{"error": {message, type, param, code}}`, and no message repeats what the
client sent except the (shortened) name of a field. Used by protocol, prompt, engine and app; ServingError by the cli.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_MESSAGE_CHARACTERS = 500
UNION_TAGS = frozenset({"(text)", "(parts)", "(ids)", "(list)"})
"""Tags that protocol.py gives the members of its unions; they are no part of a field's name."""


class ServingError(RuntimeError):
    """The server cannot start; the message is one line that says why and what to do."""


class RequestError(Exception):
    """A request is refused or failed.

    Args:
        status: HTTP status. message: one sentence for the client. param: the field at fault, as the client wrote it.
        code: a stable word for programs. retry_after_s: value of the Retry-After header, in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that belong to this error."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def envelope(self) -> dict[str, Any]:
        """The JSON body of this error."""
        return {
            "error": {
                "message": _printable(self.message),
                "type": error_type(self.status),
                "param": None if self.param is None else _printable(self.param),
                "code": self.code,
            }
        }


def error_type(status: int) -> str:
    """OpenAI's word for an HTTP status."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def from_validation(errors: Sequence[Any]) -> RequestError:
    """The RequestError for what pydantic (through FastAPI) found in a body; the first finding is told.

    `errors` is `RequestValidationError.errors()`: mappings with `type`, `loc`, `msg` and perhaps `ctx`.
    """
    first = errors[0]
    kind, location = str(first["type"]), tuple(first["loc"])
    if location[:1] == ("body",):
        location = location[1:]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "syntax error")
        at = f" at character {location[0]}" if location else ""
        return RequestError(f"The body is not valid JSON: {reason}{at}.", code="invalid_json")
    if kind == "string_unicode":
        return RequestError(
            "The body holds a name or text that is no valid Unicode.", param=field_name(location) or None
        )
    if not location:
        return RequestError(
            "The body must be a JSON object, sent with Content-Type: application/json.", code="invalid_body"
        )
    param = field_name(location)
    if kind == "missing":
        return RequestError(f"Field `{param}` is required.", param=param, code="missing_field")
    if kind == "extra_forbidden":
        return RequestError(f"Field `{param}` is not supported by this server.", param=param, code="unsupported_field")
    return RequestError(
        f"Field `{param}`: {str(first['msg']).removeprefix('Value error, ')}.", param=param, code="invalid_value"
    )


def field_name(location: Sequence[str | int]) -> str:
    """A pydantic location as a client would write it: ("messages", 0, "content") is `messages[0].content`."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part not in UNION_TAGS:
            name += f".{part}" if name else part
    return name


def _printable(text: str) -> str:
    """`text` short enough for an error and encodable as UTF-8: a field's name may hold lone surrogates."""
    cut = text if len(text) <= MAX_MESSAGE_CHARACTERS else text[: MAX_MESSAGE_CHARACTERS - 3] + "..."
    return cut.encode("utf-8", "backslashreplace").decode("utf-8")
