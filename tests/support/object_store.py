"""A real S3-protocol server (moto's server process) on the loopback address, for the tests of logs in an object store."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.ports import free_port


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Start the server; yields the storage options that reach it. Its objects live as long as it does."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, "the object store does not start"
                time.sleep(0.1)
        yield {
            "aws_endpoint_url": f"http://127.0.0.1:{port}",
            "aws_access_key_id": "test",
            "aws_secret_access_key": "test",
            "aws_region": "us-east-1",
            "aws_allow_http": "true",
        }
    finally:
        server.kill()
        server.wait()


def new_log_uri(options: dict[str, str]) -> str:
    """URI of a log in a new bucket."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=options["aws_endpoint_url"],
        aws_access_key_id=options["aws_access_key_id"],
        aws_secret_access_key=options["aws_secret_access_key"],
        region_name=options["aws_region"],
    )
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/runs/one/log"


def store_options() -> Any:
    """A module's fixture `options`: the storage options that reach an object store of its own."""

    @pytest.fixture(scope="module")
    def options() -> Iterator[dict[str, str]]:
        with object_store() as found:
            yield found

    return options
