"""Who may call: an optional bearer key, and the rule that an open address needs one.

Invariant: the key itself is held by the starting process only for as long as it takes to hash it; replicas get the
digest, and digests are compared in constant time. Used by launch.py (key) and app.py (check).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tc_ray.serving.errors import RequestError, ServingError

KEY_VARIABLE = "TC_RAY_API_KEY"
OPEN_PATHS = frozenset({"/health"})


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def configured_digest(key_file: Path | str | None = None) -> bytes | None:
    """Digest of the key in `key_file`, else of the one in TC_RAY_API_KEY; None when neither is given.

    Raises ServingError for a file that cannot be read and for an empty key.
    """
    if key_file is not None:
        try:
            key = Path(key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(f"the API key file {key_file} cannot be read: {error}") from error
        if not key:
            raise ServingError(f"the API key file {key_file} is empty")
        return digest(key)
    value = os.environ.get(KEY_VARIABLE)
    if value is None:
        return None
    if not value.strip():
        raise ServingError(f"{KEY_VARIABLE} is set but empty; unset it to serve without a key")
    return digest(value.strip())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost counts as open."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key_for(host: str, key_digest: bytes | None) -> None:
    """Raise ServingError where others could reach the server and no key is set."""
    if key_digest is None and not is_loopback(host):
        raise ServingError(
            f"host {host} can be reached from other machines and no API key is set: "
            f"set {KEY_VARIABLE} or give a key file, or serve on 127.0.0.1"
        )


class BearerAuth:
    """ASGI middleware: 401 for every path but /health unless the request carries the key."""

    def __init__(self, app: ASGIApp, key_digest: bytes) -> None:
        self._app = app
        self._digest = key_digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = RequestError(
            "A valid API key is needed: Authorization: Bearer KEY.", status=401, code="invalid_api_key"
        )
        await JSONResponse(error.envelope(), error.status, error.headers)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._digest)
