"""Shared by the tests that train with a real engine in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The process group of one worker; DeepSpeed wants one. Its own end of it: it keeps groups that the next module's are not."""
    import deepspeed.comm
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield
    (deepspeed.comm if deepspeed.comm.is_initialized() else dist).destroy_process_group()
