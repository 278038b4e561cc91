"""The learning rate's schedules, and how the Pilot computes attention in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tc_ray.models.pilot.load import check_attention, check_folders, load_pilot
from tc_ray.models.schedule import rate_factor
from tests.support.tiny_run import tiny_config


def test_schedules_share_the_warm_up_and_part_after_it() -> None:
    kinds: tuple[Any, ...] = ("cosine", "linear", "constant")
    made = {kind: [rate_factor(i, steps=50, warmup_ratio=0.2, schedule=kind) for i in range(51)] for kind in kinds}
    assert all(rates[:11] == [(i + 1) / 10 for i in range(10)] + [1.0] for rates in made.values())
    assert made["constant"][10:] == [1.0] * 41
    assert made["linear"][10:] == pytest.approx([1 - i / 40 for i in range(41)])
    assert made["cosine"][20] > made["linear"][20] and made["cosine"][45] < made["linear"][45]
    # a schedule that is asked beyond its end stays there
    assert [rate_factor(99, steps=50, warmup_ratio=0.2, schedule=kind) for kind in kinds] == [0.0, 0.0, 1.0]


def test_the_asked_attention_is_computed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__attn_implementation="eager")
    folder = Path(config.model.pilot)
    check_folders(config, folder, folder)
    eager, own = (load_pilot(folder, dtype=torch.float32, attention=how).eval() for how in ("eager", None))
    assert (eager.config._attn_implementation, own.config._attn_implementation) == ("eager", "sdpa")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.allclose(eager(ids).logits, own(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("flesh_attention_2", "flesh_attention_2 is unknown; transformers has eager, .*sdpa"),
        ("flash_attention_2", "flash_attention_2 computes on GPUs: set resources.pilot_gpus=1, or use sdpa"),
    ],
)
def test_attention_that_cannot_be_is_refused_by_name(tmp_path: Path, name: str, why: str) -> None:
    config = tiny_config(tmp_path, model__attn_implementation=name)
    folder = Path(config.model.pilot)
    with pytest.raises(ValueError, match=f"model.attn_implementation {why}"):
        check_folders(config, folder, folder)
    with pytest.raises(ValueError, match=name):
        check_attention(config)
