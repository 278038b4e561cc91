"""HTTP over a bare socket: requests that no client library would send, and answers that come before the request has ended."""

from __future__ import annotations

import http.client
import json
import select
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

PIECE_BYTES = 2**16


@dataclass(frozen=True)
class Answer:
    """What came back. seconds: from before the connection was made to the last byte. sent_bytes: of the body."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    sent_bytes: int

    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


def exchange(
    port: int,
    method: str,
    target: str,
    headers: dict[str, str],
    body: bytes | Iterable[bytes] = b"",
    *,
    seconds: float = 30,
) -> Answer:
    """Send a request and read its answer, sending no more once there is one.

    A body in pieces is sent in chunks, unless the headers state its length.
    """
    head = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    pieces: Iterator[bytes]
    if isinstance(body, bytes):
        if "Content-Length" not in headers:
            head.append(f"Content-Length: {len(body)}")
        pieces = (body[at : at + PIECE_BYTES] for at in range(0, len(body), PIECE_BYTES))
    elif "Content-Length" in headers:
        pieces = iter(body)
    else:
        head.append("Transfer-Encoding: chunked")
        pieces = chunked(body)
    return send("\r\n".join(head).encode("latin-1") + b"\r\n\r\n", pieces, port, seconds=seconds)


def chunked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces as chunks, and the end."""
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def send(head: bytes, pieces: Iterable[bytes], port: int, *, seconds: float = 30) -> Answer:
    """As `exchange`, for bytes that need not be HTTP. Raises ConnectionError when there is no answer."""
    begun = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head)
        sent = 0
        for piece in pieces:
            rest = memoryview(piece)
            while rest and not select.select([connection], [], [], 0)[0]:
                if select.select([connection], [connection], [], seconds)[1]:
                    try:
                        count = connection.send(rest[:PIECE_BYTES])
                    except ConnectionError:
                        break  # closed since it was looked at; an answer that came before can still be read
                    rest, sent = rest[count:], sent + count
            if rest:
                break
        response = http.client.HTTPResponse(connection)
        try:
            response.begin()
            content = response.read()
        except (http.client.BadStatusLine, http.client.IncompleteRead) as error:
            raise ConnectionError(f"no whole answer: {error}") from error
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, content, time.perf_counter() - begun, sent)
