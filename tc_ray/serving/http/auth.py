"""API keys: where they come from, how a request is checked, and that an open address needs one.

Invariant: the starting process hashes the keys at once; replicas get the digests, and a given key is compared with all of
them in constant time. A browser loads the web page without a bearer header, so the page takes a key as a password too. The
API does not: browsers send passwords on their own, also for other sites. Used by deploy/ (keys) and app.py (check).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from tc_ray.serving.errors import RequestError, ServingError

KEY_VARIABLE = "TC_RAY_API_KEY"
OPEN_PATHS = frozenset({"/health"})
PAGE_CHALLENGE = 'Basic realm="tc-ray: any name, an API key as password", charset="UTF-8"'


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def configured_digests(key_file: Path | str | None = None) -> tuple[bytes, ...]:
    """Digests of the keys in `key_file`, else of the one in TC_RAY_API_KEY; empty when neither is given.

    A key file is UTF-8 with one key per line; empty lines and those that begin with # are skipped.
    Raises ServingError for a file that cannot be read, a line that is no key, a file without keys and an empty variable.
    """
    if key_file is not None:
        keys = [_key(line, f"the API key file {key_file}, line {number}") for number, line in _key_lines(key_file)]
        if not keys:
            raise ServingError(f"the API key file {key_file} holds no key; write one per line")
        return tuple(dict.fromkeys(digest(key) for key in keys))
    value = os.environ.get(KEY_VARIABLE)
    if value is None:
        return ()
    if not value.strip():
        raise ServingError(f"{KEY_VARIABLE} is set but empty; unset it to serve without a key")
    return (digest(_key(value, KEY_VARIABLE)),)


def _key_lines(key_file: Path | str) -> list[tuple[int, str]]:
    """Numbers and texts of the lines of a key file that hold keys."""
    try:
        content = Path(key_file).read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ServingError(f"the API key file {key_file} is UTF-16; save it as UTF-8")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ServingError(f"the API key file {key_file} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ServingError(f"the API key file {key_file} is no UTF-8 (byte {error.start}); save it as UTF-8") from None
    # not splitlines: it also cuts at other characters and would make two keys of one
    lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)
    return [(number, line) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]


def _key(text: str, where: str) -> str:
    """The key in a text. Raises ServingError, which does not show it, unless the text is one word of printable characters."""
    key = text.strip()
    odd = next((character for character in key if character.isspace() or not character.isprintable()), None)
    if odd is not None:
        raise ServingError(
            f"{where}: a key is one word, and this holds the character U+{ord(odd):04X}; a comment needs a line of its own"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost counts as open."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key_for(host: str, key_digests: Sequence[bytes], allow_open: bool = False) -> None:
    """Raise ServingError where other machines can reach the server, no key is set and this was not allowed explicitly."""
    if not key_digests and not allow_open and not is_loopback(host):
        raise ServingError(
            f"host {host} can be reached from other machines and no API key is set: "
            f"set {KEY_VARIABLE} or give a key file, serve on 127.0.0.1, or allow it with serving.allow_open=true"
        )


class BearerAuth:
    """ASGI middleware: answers 401 on every path but /health unless the request has a bearer key, or the page a password.

    It puts the digest of the key into the scope's state, as `key`, for the limit per key.
    """

    def __init__(self, app: ASGIApp, key_digests: Sequence[bytes]) -> None:
        self._app = app
        self._digests = tuple(key_digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        key = self._key_of(scope)
        if key is None:
            error = RequestError(
                "A valid API key is needed: Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
                challenge=PAGE_CHALLENGE if _is_page(scope) else "Bearer",
            )
            await error.answer(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key
        await self._app(scope, receive, send)

    def _key_of(self, scope: Scope) -> bytes | None:
        """Digest of the request's key, if it is a valid one."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, key = given[0].partition(b" ")
        if scheme.lower() == b"basic" and _is_page(scope):
            key = _password(key)
        elif scheme.lower() != b"bearer":
            return None
        sent = hashlib.sha256(key.strip()).digest()
        # All are compared, so that the time does not show which one matched.
        matches = [hmac.compare_digest(sent, known) for known in self._digests]
        return sent if any(matches) else None


def _is_page(scope: Scope) -> bool:
    """Whether the request is for the web page or one of its files."""
    return scope["path"] == "/" or str(scope["path"]).startswith("/page/")


def _password(encoded: bytes) -> bytes:
    """The password of HTTP Basic credentials; empty if there is none."""
    try:
        return base64.b64decode(encoded.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
