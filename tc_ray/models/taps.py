"""Taps: hidden states of the Pilot's decoder layers, taken in the forward pass that runs anyway.

Invariant: no second forward and nothing kept but one pooled state a position. A forward hook on each decoder layer adds
the layer's detached output to one fp32 accumulator, so gradient checkpointing (whose recomputation happens outside
`recording`) and ZeRO-3 (which gathers parameters, not activations) do not matter to it. Used by the Pilot's training
step and, at inference, by the fused model: both see the same definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Pooling:
    """How states of L layers become one (table 19): `add` takes one in place, `finish` ends after L of them."""

    add: Callable[[torch.Tensor, torch.Tensor], object]
    finish: Callable[[torch.Tensor, int], torch.Tensor]


POOLINGS = {
    "mean": Pooling(lambda pooled, state: pooled.add_(state), lambda pooled, count: pooled.div_(count)),
    "max": Pooling(
        lambda pooled, state: torch.maximum(pooled, state.to(pooled.dtype), out=pooled), lambda pooled, count: pooled
    ),
    "sum": Pooling(lambda pooled, state: pooled.add_(state), lambda pooled, count: pooled),
}


def tap_definition(pooling: str = "mean") -> str:
    """The tap in words, stored with every log and Copilot: a Copilot is valid only for states tapped the same way."""
    return f"{pooling} over decoder layers 1..L of the layer output, before the final norm"


class LayerTap:
    """Hidden states of one forward pass pooled over layers (equation 6: the mean of `h_t,i,l` over `l`).

    Args:
        layers: the decoder layers, in order; their outputs are [batch, positions, width].
        pooling: a name in POOLINGS.
    """

    def __init__(self, layers: Sequence[nn.Module], pooling: str = "mean") -> None:
        self._count, self._pooling = len(layers), POOLINGS[pooling]
        self._pooled: torch.Tensor | None = None
        self._recording = False
        self._handles = [layer.register_forward_hook(self._hook) for layer in layers]

    def _hook(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not self._recording:
            return
        state = (output[0] if isinstance(output, tuple) else output).detach()
        if self._pooled is None:
            self._pooled = state.to(torch.float32, copy=True)
        else:
            self._pooling.add(self._pooled, state)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Accumulate during the enclosed forward pass; call `take` after it."""
        self._pooled, self._recording = None, True
        try:
            yield
        finally:
            self._recording = False

    def take(self) -> torch.Tensor:
        """The pooled states, fp32 [batch, positions, width], of the pass recorded last; hands them over once.

        Raises:
            RuntimeError: no pass was recorded.
        """
        if self._pooled is None:
            raise RuntimeError("no forward pass was recorded: wrap it in `with tap.recording():`")
        pooled, self._pooled = self._pooling.finish(self._pooled, self._count), None
        return pooled

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
