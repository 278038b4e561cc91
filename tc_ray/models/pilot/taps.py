"""Taps: hidden states of the Pilot's decoder layers, taken in the forward pass that runs anyway.

Invariant: no second forward. A hook on each tapped layer adds its detached output to one fp32 accumulator, or keeps it as it is if
the log stores layers. It works with gradient checkpointing (which recomputes outside `recording`) and with ZeRO-3 (which gathers
parameters, not activations). Used by the Pilot's training step and, with the same definition, by the fused model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "mean": torch.Tensor.add_,
    "max": lambda pooled, state: torch.maximum(pooled, state.to(pooled.dtype), out=pooled),
    "sum": torch.Tensor.add_,
}
"""How one more layer's state is added to the pooled ones, in place (table 19)."""
UNPOOLED: Literal["none"] = "none"
"""Instead of a pooling: the states of the tapped layers, each by itself."""
Rationale = Literal["pooled", "all"] | list[int]
"""`log.rationale`: which states of a position the log keeps."""


def tap_definition(pooling: str = "mean", layers: Sequence[int] | None = None) -> str:
    """The tap in words, stored with every log and Copilot: a Copilot is valid only for states tapped the same way."""
    how = "each of" if pooling == UNPOOLED else f"{pooling} over"
    which = "1..L" if layers is None else f"{', '.join(map(str, layers))} (counted from 0)"
    return f"{how} decoder layers {which} of the layer output, before the final norm"


def tapped_layers(rationale: Rationale, count: int) -> list[int] | None:
    """Layers that `log.rationale` names of a Pilot of `count`, from 0; None: all. ValueError: it names none such, or out of order."""
    if isinstance(rationale, str):
        return None
    if not rationale or list(rationale) != sorted(set(rationale)) or rationale[0] < 0 or rationale[-1] >= count:
        raise ValueError(
            f"log.rationale {rationale} must name layers of the Pilot in ascending order, each once: "
            f"it has {count} decoder layers, 0 to {count - 1}"
        )
    return list(rationale)


def log_pooling(rationale: Rationale, pooling: Literal["mean", "max", "sum"]) -> Literal["mean", "max", "sum", "none"]:
    """How the log's states are pooled: `log.pooling`, or UNPOOLED."""
    return pooling if rationale == "pooled" else UNPOOLED


def pooled(states: torch.Tensor, pooling: str) -> torch.Tensor:
    """States [.., L, d] of L layers -> fp32 [.., d]: bit for bit what a tap with that pooling gives."""
    total = states[..., 0, :].to(torch.float32, copy=True)
    for layer in range(1, states.shape[-2]):
        POOLINGS[pooling](total, states[..., layer, :])
    return total.div_(states.shape[-2]) if pooling == "mean" else total


class LayerTap:
    """Hidden states of one forward pass, pooled over layers (equation 6: the mean of `h_t,i,l` over `l`) or layer by layer.

    layers: all decoder layers; their outputs are [batch, positions, width]. pooling: a name in POOLINGS, or UNPOOLED.
    chosen: the layers to tap, ascending from 0; None: all.
    """

    def __init__(self, layers: Sequence[nn.Module], pooling: str = "mean", chosen: Sequence[int] | None = None) -> None:
        tapped = list(layers) if chosen is None else [layers[index] for index in chosen]
        self._count, self._pooling = len(tapped), pooling
        self._add = None if pooling == UNPOOLED else POOLINGS[pooling]
        self._pooled: torch.Tensor | None = None
        self._each: list[torch.Tensor] = []
        self._recording, self._first = False, 0
        self._handles = [layer.register_forward_hook(self._hook) for layer in tapped]

    def _hook(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not self._recording:
            return
        state = (output[0] if isinstance(output, tuple) else output).detach()
        if self._add is None:
            self._each.append(state[:, self._first :].clone() if self._first else state)  # a view would hold all of it
        elif self._pooled is None:
            self._pooled = state.to(torch.float32, copy=True)
        else:
            self._add(self._pooled, state)

    @contextmanager
    def recording(self, first: int = 0) -> Iterator[None]:
        """Record states during the enclosed forward pass (unpooled ones from position `first` on); call `take` after it."""
        self._pooled, self._each, self._recording, self._first = None, [], True, first
        try:
            yield
        finally:
            self._recording = False

    def take(self) -> torch.Tensor:
        """The states of the last recorded pass, once (else RuntimeError).

        Pooled: fp32 [batch, positions, width]; else [batch, positions, layers, width] in the model's dtype.
        """
        if self._pooled is not None:
            states, self._pooled = self._pooled, None
            if self._pooling == "mean":
                states.div_(self._count)
        elif self._each:
            states, self._each = torch.stack(self._each, 2), []
        else:
            raise RuntimeError("no forward pass was recorded: wrap it in `with tap.recording():`")
        return states

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
