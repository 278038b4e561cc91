"""The run of a module: its test file says by the fixture `config` what is trained."""

from __future__ import annotations

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.run.job import JobResult, run_job


@pytest.fixture(scope="module")
def result(config: RunConfig) -> JobResult:
    return run_job(config)
