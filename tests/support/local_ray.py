"""A Ray of its own for the tests of a module: `cluster = local_ray(cpus=2)` at the top of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray


def local_ray(cpus: int) -> Any:
    """An automatic fixture: Ray on this machine, with so many CPUs, from the module's first test to its last."""

    @pytest.fixture(scope="module", autouse=True)
    def started() -> Iterator[None]:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()

    return started
