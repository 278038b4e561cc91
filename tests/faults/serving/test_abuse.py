"""The server under abuse: whatever is sent, it refuses quickly, in the shapes it documents, and stays as it was.

The server is a process of its own, so that its memory can be read. The requests are those of tests/support/bad_requests.py, and
what is no HTTP; test_serving_schema.py has those that are made from the server's own OpenAPI document.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from tests.support.bad_requests import ALIVE, COMPLETIONS, JSON_TYPE, MINIMAL, BadRequest, bad_requests
from tests.support.raw_http import PIECE_BYTES, Answer, exchange, send
from tests.support.serving_process import TRIES, ServingProcess, timed
from tests.support.serving_samples import make_export

MAX_ANSWER_S = 0.1
MAX_GROWTH_BYTES = 50_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingProcess]:
    export = make_export(tmp_path_factory.mktemp("abuse"), positions=512)
    with ServingProcess(export) as server:
        for path, minimal in MINIMAL.items():
            for _ in range(10):
                assert exchange(server.port, "POST", path, JSON_TYPE, f"{{{minimal}}}".encode()).status == 200
        yield server


@pytest.fixture(scope="module")
def said(server: ServingProcess) -> str:
    """What the server answers to the good request before it is abused."""
    return text(server)


@pytest.fixture(autouse=True)
def as_before(server: ServingProcess, said: str) -> Iterator[None]:
    """After each test the server still says the same, and has not grown."""
    before, _ = server.memory_bytes()
    server.forget_peak()
    yield
    assert text(server) == said
    now, peak = server.memory_bytes()
    print(f"memory: {before / 1e6:.0f} MB before, {now / 1e6:.0f} MB after, {peak / 1e6:.0f} MB at most")
    assert peak - before < MAX_GROWTH_BYTES


def text(server: ServingProcess) -> str:
    answer = exchange(server.port, "POST", COMPLETIONS, JSON_TYPE, ALIVE)
    assert answer.status == 200
    return str(answer.json()["choices"][0]["text"])


def once(server: ServingProcess, request: BadRequest) -> Answer:
    body: bytes | Iterable[bytes] = request.body
    if request.chunked:
        body = (request.body[at : at + PIECE_BYTES] for at in range(0, len(request.body), PIECE_BYTES))
    return exchange(server.port, request.method, request.path, request.headers, body)


def seconds_of(server: ServingProcess, ask: Callable[[], Answer]) -> tuple[Answer, float, list[float]]:
    """See `timed`."""

    def once_more() -> tuple[Answer, float]:
        answer = ask()
        return answer, answer.seconds

    return timed(server, once_more, MAX_ANSWER_S)


class Document:
    """The server's OpenAPI document: what each route may answer."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def faults(self, request: BadRequest, answer: Answer) -> list[str]:
        """How an answer departs from what is documented, else from the error envelope."""
        if answer.headers.get("content-type") != "application/json":
            return [f"type {answer.headers.get('content-type')}"]
        path = "/v1/models/{name}" if request.path.startswith("/v1/models/") else request.path
        operation = self._document["paths"].get(path, {}).get(request.method.lower())
        schema: dict[str, Any] = {"$ref": "#/components/schemas/ErrorEnvelope"}
        if operation is not None:
            documented = operation["responses"].get(str(answer.status), operation["responses"]["default"])
            schema = documented["content"]["application/json"]["schema"]
        validator = jsonschema_rs.validator_for({**schema, "components": self._document["components"]})
        return [error.message for error in validator.iter_errors(answer.json())]


def test_bad_requests_are_refused_quickly_as_documented(server: ServingProcess) -> None:
    document = Document(exchange(server.port, "GET", "/openapi.json", {}).json())
    requests = bad_requests()
    assert len([request for request in requests if request.method == "POST" and request.body]) > 300
    wrong, seconds, held_up = [], [], 0
    for request in requests:
        answer, counted, tries = seconds_of(server, lambda request=request: once(server, request))  # type: ignore[misc]
        seconds.append(tries[0])
        held_up += counted not in tries
        faults = document.faults(request, answer)
        if answer.status not in request.refused:
            faults.append(f"status {answer.status}")
        if counted >= MAX_ANSWER_S:
            faults.append(f"{1000 * counted:.0f} ms of CPU, {1000 * min(tries):.0f} ms")
        if faults:
            wrong.append(f"{request.name}: {'; '.join(faults)}: {answer.body[:150]!r}")
    seconds.sort()
    print(
        f"{len(requests)} requests, first try: median {1000 * seconds[len(seconds) // 2]:.1f} ms, 99th percentile "
        f"{1000 * seconds[len(seconds) * 99 // 100]:.1f} ms, longest {1000 * seconds[-1]:.1f} ms, "
        f"{len([s for s in seconds if s >= MAX_ANSWER_S])} late; late in all {TRIES} tries: {held_up}"
    )
    assert not wrong, f"{len(wrong)} of {len(requests)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", MINIMAL)
def test_200_megabytes_are_refused_unread(server: ServingProcess, path: str) -> None:
    body = bytes(200_000_000)
    answer, seconds, _ = seconds_of(server, lambda: exchange(server.port, "POST", path, JSON_TYPE, body))
    assert (answer.status, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert seconds < MAX_ANSWER_S
    assert answer.sent_bytes < 20_000_000


@pytest.mark.parametrize("piece", [b" " * PIECE_BYTES, b'{"a":' * 10_000, b"[" * PIECE_BYTES])
def test_a_body_without_end_is_refused_at_the_limit(server: ServingProcess, piece: bytes) -> None:
    answer, seconds, _ = seconds_of(
        server, lambda: exchange(server.port, "POST", COMPLETIONS, JSON_TYPE, itertools.repeat(piece))
    )
    assert (answer.status, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert seconds < MAX_ANSWER_S
    assert answer.sent_bytes < 20_000_000


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
NO_HTTP = {
    "noise": bytes(range(256)) * 40,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200 + b"\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
    "length below 0": POST + b"Content-Length: -5\r\n\r\n",
    "length no number": POST + b"Content-Length: x\r\n\r\n",
    "length of 400 digits": POST + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n",
    "chunk of no size": POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "chunk size of 400 digits": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 400 + b"\r\n",
    "name with a blank": POST + b"X Y: 1\r\nContent-Length: 0\r\n\r\n",
    "NUL in a name": POST + b"X\0Y: 1\r\nContent-Length: 0\r\n\r\n",
    "a head of 1 MB": POST + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n",
    "100,000 headers": POST + b"".join(b"X%d: 1\r\n" % i for i in range(100_000)) + b"\r\n",
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_refused(server: ServingProcess, name: str) -> None:
    try:
        answer = send(NO_HTTP[name], [], server.port)
    except ConnectionError:
        return  # closed without a word
    assert 400 <= answer.status < 500


def test_clients_that_go_in_the_middle_leave_nothing_behind(server: ServingProcess) -> None:
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for cut in range(200):
        head = POST + b"Content-Length: 100000\r\n\r\n" + b"x" * (cut * 50)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head[: len(head) if cut % 2 else 60])
    text(server)
    assert len(list(descriptors.iterdir())) <= before + 2
