"""A model that was written and read back, against the one that was to be written.

Used by the exports of the Pilot before a folder is published.
"""

from __future__ import annotations

from typing import Any

import torch

from tc_ray.models.weights import ExportMismatchError


def compare_weights(found: Any, wanted: Any, tolerance: float, what: str) -> None:
    """Raise ExportMismatchError where a weight of `wanted` is absent from `found`, or differs by more than `tolerance` of its largest.

    tolerance: 0 wants the same numbers. what: the subject of the message.
    """
    weights = dict(found.named_parameters())
    other = sorted(weights.keys() ^ {name for name, _ in wanted.named_parameters()})
    if other:
        raise ExportMismatchError(f"nothing was published: {what} has other weights than the Pilot: {other[0]}")
    for name, weight in wanted.named_parameters():
        largest = float(weight.detach().float().abs().max())
        difference = float((weights[name].detach().float() - weight.detach().float()).abs().max())
        # not "greater than": NaN is never close
        if not difference <= tolerance * largest:
            raise ExportMismatchError(f"nothing was published: {what} has another weight {name} than the Pilot")


@torch.no_grad()
def compare_logits(found: Any, wanted: Any, tolerance: float, what: str) -> None:
    """Raise ExportMismatchError where logits differ by more than `tolerance` of the largest, on 48 tokens drawn by a fixed seed."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(wanted.config.vocab_size), (1, 48), generator=drawn)
    extra = {"decoder_input_ids": ids[:, :12]} if wanted.config.is_encoder_decoder else {}
    a, b = (model(input_ids=ids, use_cache=False, **extra).logits.float() for model in (found, wanted))
    difference, largest = float((a - b).abs().max()), float(b.abs().max())
    # not "greater than": NaN is never close
    if not difference <= tolerance * largest:
        raise ExportMismatchError(
            f"nothing was published: {what} has logits that differ from the Pilot's by {difference:.2g} (the largest is {largest:.3g})"
        )
