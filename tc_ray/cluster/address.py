"""Whether a Ray answers at the address that RAY_ADDRESS names, known within seconds.

Invariant: an address at which no Ray answers is an AddressError of one line, ANSWER_SECONDS + REASON_SECONDS later at most.
Ray itself waits up to minutes for a port or a host that is not there. Called by `cluster.session` and `serving.deploy.launch`
before they join.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import threading
import urllib.parse
from pathlib import Path
from typing import Any

from tc_ray.config.redact import redact

ANSWER_SECONDS = 6.0
"""For a Ray to answer; a head that is just starting may take some of them."""
REASON_SECONDS = 3.0
"""To find out why none has."""
CLIENT_PORT = 10001
FORMS = "HOST:PORT of the head (port 6379 by default), ray://HOST:10001, auto for the Ray of this machine, or local"
TLS_VARIABLES = {
    "root_certificates": "RAY_TLS_CA_CERT",
    "private_key": "RAY_TLS_SERVER_KEY",
    "certificate_chain": "RAY_TLS_SERVER_CERT",
}


class AddressError(ConnectionError):
    """No Ray can be joined at the address; the message says why and what to write."""


def check_address(address: str) -> None:
    """Return once a Ray has answered at `address`, in any form that RAY_ADDRESS takes. Raises AddressError."""
    scheme, slashes, rest = address.partition("://")
    if address == "local":
        return
    if not slashes:
        _answers(
            address, _running_here(address) if address == "auto" else _host_and_port(address, address), proxy=False
        )
    elif scheme == "ray":
        _answers(address, _host_and_port(address, re.split(r"[/?]", rest)[0], CLIENT_PORT), proxy=True)
    elif scheme in ("http", "https"):
        host = urllib.parse.urlsplit(address).hostname or "HOST"
        raise AddressError(
            f"RAY_ADDRESS {redact(address)} is that of the dashboard, which takes jobs: `ray job submit -- ...`; to join the "
            f"cluster from here write RAY_ADDRESS={host}:6379 or ray://{host}:{CLIENT_PORT}, or unset it for a Ray of its own"
        )
    elif not re.fullmatch(r"\w+", scheme) or importlib.util.find_spec(scheme) is None:
        raise AddressError(f"RAY_ADDRESS {redact(address)} has an unknown form: write {FORMS}")


def _host_and_port(address: str, text: str, port: int | None = None) -> tuple[str, int]:
    """Of HOST:PORT, or of [HOST]:PORT for IPv6. port: where the text has none."""
    found = re.fullmatch(r"(\[[^\]]+\]|[^:\[\]/\s]+)(?::(\d{1,5}))?", text)
    number = int(found[2]) if found and found[2] else port
    if not found or number is None or not 0 < number < 65536:
        raise AddressError(f"RAY_ADDRESS {redact(address)} is not an address of Ray: write {FORMS}")
    return found[1].strip("[]"), number


def _running_here(address: str) -> tuple[str, int]:
    """Where the Ray of this machine was last seen."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address(address)
    except ConnectionError:
        found = None
    if not found:
        raise AddressError(
            "RAY_ADDRESS auto: no Ray runs on this machine; start one (`ray start --head`), write HOST:PORT of another, or "
            "unset RAY_ADDRESS for a Ray of its own"
        )
    return _host_and_port(address, found)


def _answers(address: str, place: tuple[str, int], proxy: bool) -> None:
    """proxy: Ray goes through a proxy that the environment names."""
    import grpc

    target = f"[{place[0]}]:{place[1]}" if ":" in place[0] else f"{place[0]}:{place[1]}"
    options = [("grpc.enable_http_proxy", int(proxy)), ("grpc.max_reconnect_backoff_ms", 1000)]
    channel = _channel(grpc, target, options)
    try:
        # ready: the other side speaks Ray's protocol; that a port takes connections says nothing
        grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
    except grpc.FutureTimeoutError:
        where = redact(address) if address != "auto" else f"auto ({target})"
        raise AddressError(
            f"RAY_ADDRESS {where}: no Ray answers there within {ANSWER_SECONDS:g} s: {_reason(place)}; correct RAY_ADDRESS, or "
            "unset it for a Ray of its own"
        ) from None
    finally:
        channel.close()


def _channel(grpc: Any, target: str, options: list[tuple[str, int]]) -> Any:
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(target, options)
    files = {name: os.environ.get(variable) for name, variable in TLS_VARIABLES.items()}
    try:
        read = {name: Path(file).read_bytes() for name, file in files.items() if file}
    except OSError as error:
        raise AddressError(f"RAY_USE_TLS is set, but {error.filename} cannot be read: {error.strerror}") from None
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(**read), options)


def _reason(place: tuple[str, int]) -> str:
    """Why nothing answers; a name server that does not answer either may block for minutes, so a thread asks."""
    found = ["nothing answers; a wrong address, a firewall, or a machine that is down"]

    def ask() -> None:
        try:
            socket.create_connection(place, timeout=REASON_SECONDS).close()
            found[0] = (
                "something listens there, but does not answer as a Ray of this kind does (port of another service, TLS)"
            )
        except socket.gaierror:
            found[0] = f"the host name {place[0]} is not known"
        except ConnectionRefusedError:
            found[0] = "nothing listens on that port"
        except TimeoutError:
            pass
        except OSError as error:
            found[0] = error.strerror or str(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REASON_SECONDS)
    return found[0]
