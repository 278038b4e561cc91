"""Nothing is computed twice: recording takes the training forward itself, and the head sees the rows that predict a target."""

from __future__ import annotations

import pytest
import torch

from tc_ray.models.families import family_of
from tc_ray.models.pilot.step import PilotStep
from tests.support.family_samples import new_pilot, quiet
from tests.support.tiny_families import FAMILIES
from tests.unit.models.test_families_copilot import SHAPES, examples

quiet()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_and_the_head_on_target_rows_alone(family: str) -> None:
    """With a record and without: one pass through the decoder, one through the head, and no row more."""
    pilot = new_pilot(family)
    calls: list[tuple[str, int]] = []
    decoder = family_of(pilot).decoder(pilot)
    decoder.register_forward_hook(lambda *_: calls.append(("decoder", 1)))
    pilot.get_output_embeddings().register_forward_hook(
        lambda _module, given, _out: calls.append(("head", given[0].numel() // given[0].shape[-1]))
    )
    targets = sum(length - start for length, start in SHAPES)
    for record in (True, False):
        step = PilotStep(pilot, top_k=5, record=record).train()
        loss, made = step(*examples(), 1.0)
        loss.backward()
        step.close()
        assert (made is not None) == record and torch.isfinite(loss)
        assert calls == [("decoder", 1), ("head", targets)]
        calls.clear()
