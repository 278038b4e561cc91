"""API keys: where they come from, and that an open address needs one.

Invariant: the starting process hashes the keys at once; replicas get the digests (http/gate.py checks them).
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from tc_ray.serving.errors import ServingError

KEY_VARIABLE = "TC_RAY_API_KEY"


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def configured_digests(key_file: Path | str | None = None) -> tuple[bytes, ...]:
    """Digests of the keys in `key_file`, else of the one in TC_RAY_API_KEY; empty when neither is given.

    A key file is UTF-8 with one key per line; empty lines and those that begin with # are skipped.
    Raises ServingError, which shows no key, for a file that cannot be read, a line that is no single word, and no key at all.
    """
    if key_file is None:
        value = os.environ.get(KEY_VARIABLE)
        if value is None:
            return ()
        where, lines = KEY_VARIABLE, [value]
    else:
        where = f"the API key file {key_file}"
        try:
            lines = Path(key_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(f"{where} cannot be read as UTF-8: {error}") from None
        lines = [line for line in lines if not line.lstrip().startswith("#")]
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ServingError(f"{where} holds no key; it is empty")
    if any(len(key.split()) > 1 or not key.isprintable() for key in keys):
        raise ServingError(f"{where}: a key is one word; a comment needs a line of its own that begins with #")
    return tuple(dict.fromkeys(map(digest, keys)))


def require_key_for(host: str, key_digests: Sequence[bytes], allow_open: bool = False) -> None:
    """Raise ServingError where other machines can reach the server, no key is set and this was not allowed explicitly."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False  # a name other than localhost counts as open
    if not (key_digests or allow_open or loopback):
        raise ServingError(
            f"host {host} can be reached from other machines and no API key is set: "
            f"set {KEY_VARIABLE} or give a key file, serve on 127.0.0.1, or allow it with serving.allow_open=true"
        )
