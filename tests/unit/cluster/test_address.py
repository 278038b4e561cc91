"""A RAY_ADDRESS at which no Ray answers, in every form: one line, and soon."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from tc_ray.cluster import address
from tc_ray.cluster.address import AddressError, check_address
from tests.support.command_line import tc_ray, tc_ray_process


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as bound:  # bound and not listening: nobody else gets it
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def refused(text: str) -> str:
    """The message, after at most the seconds that are promised."""
    begun = time.monotonic()
    with pytest.raises(AddressError) as caught:
        check_address(text)
    assert time.monotonic() - begun < address.ANSWER_SECONDS + address.REASON_SECONDS + 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address.ANSWER_SECONDS + address.REASON_SECONDS <= 9, "15 s with Python's and Ray's imports"
    monkeypatch.setattr(address, "ANSWER_SECONDS", 1.5)
    monkeypatch.setattr(address, "REASON_SECONDS", 1.0)


@pytest.mark.parametrize("form", ["{}", "ray://{}", "ray://{}/namespace?x=1"])
def test_nobody_answers(form: str, short: None, silent_port: int, closed_port: int) -> None:
    assert "nothing listens on that port; correct RAY_ADDRESS" in refused(form.format(f"127.0.0.1:{closed_port}"))
    assert "something listens there, but does not answer" in refused(form.format(f"127.0.0.1:{silent_port}"))
    unknown = refused(form.format("no-such-host.invalid:6379"))
    # a name server that does not answer cannot say that there is no such host
    assert "host name no-such-host.invalid is not known" in unknown or "nothing answers" in unknown


def test_auto_finds_a_ray_that_is_gone(short: None, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray notes the address of the last one in a file, which outlives it."""
    found = f"127.0.0.1:{closed_port}"
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda _: found)
    assert f"RAY_ADDRESS auto ({found}): no Ray answers there" in refused("auto")

    def none(_: str) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", none)
    assert "RAY_ADDRESS auto: no Ray runs on this machine" in refused("auto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://head:8265", "that of the dashboard, which takes jobs"),
        ("https://u:p@head:8265/", "RAY_ADDRESS=head:6379 or ray://head:10001"),
        ("head", "is not an address of Ray: write HOST:PORT"),
        ("head:many", "is not an address of Ray"),
        ("head:70000", "is not an address of Ray"),
        ("ray://", "is not an address of Ray"),
        ("no_such_scheme://head", "unknown form: write HOST:PORT"),
        ("a b", "is not an address of Ray"),
    ],
)
def test_forms_that_are_none_are_refused_at_once(text: str, message: str) -> None:
    begun = time.monotonic()
    shown = refused(text)
    assert message in shown and "u:p" not in shown
    assert time.monotonic() - begun < 2


def test_what_answers_passes() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        for form in ("127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}", "ray://127.0.0.1:{}/space"):
            check_address(form.format(port))
        check_address("local")
    finally:
        server.stop(None)


def test_the_command_ends_with_one_line(closed_port: int, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = tc_ray_process("train", "demo", cwd=tmp_path, RAY_ADDRESS=f"127.0.0.1:{closed_port}")
    seconds = time.monotonic() - begun
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"tc-ray: RAY_ADDRESS 127.0.0.1:{closed_port}: no Ray answers there")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert seconds < 40, "15 s on a machine that is not busy"
    status = tc_ray("status", tmp_path / "outputs" / "demo").stdout
    assert f"state         failed\nwhy           RAY_ADDRESS 127.0.0.1:{closed_port}: no Ray answers there" in status
