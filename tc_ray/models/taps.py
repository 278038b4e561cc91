"""Taps: hidden states of the Pilot's decoder layers, taken in the forward pass that runs anyway.

Invariant: no second forward and nothing kept but a running mean. A forward hook on each decoder layer adds the layer's
detached output to one fp32 accumulator, so gradient checkpointing (whose recomputation happens outside `recording`)
and ZeRO-3 (which gathers parameters, not activations) do not matter to it. Used by the Pilot's training step and, at
inference, by the fused model: both see the same definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TAP_DEFINITION = "mean over decoder layers 1..L of the layer output, before the final norm"
"""Stored with every log and Copilot: a Copilot is valid only for states tapped the same way (equation 6)."""


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """Decoder layers of a causal language model, through any peft wrapper."""
    return backbone(model).layers


def backbone(model: nn.Module) -> Any:
    """The headless decoder (`layers`, `norm`, `embed_tokens`) inside a causal language model or its peft wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder()


class LayerMeanTap:
    """Mean over layers of the hidden states of one forward pass (equation 6, `h_t,i` averaged over `l`).

    Args:
        layers: the decoder layers, in order; their outputs are [batch, positions, width].
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._count = len(layers)
        self._sum: torch.Tensor | None = None
        self._recording = False
        self._handles = [layer.register_forward_hook(self._hook) for layer in layers]

    def _hook(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not self._recording:
            return
        state = (output[0] if isinstance(output, tuple) else output).detach()
        if self._sum is None:
            self._sum = state.to(torch.float32, copy=True)
        else:
            self._sum.add_(state)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Accumulate during the enclosed forward pass; call `take` after it."""
        self._sum, self._recording = None, True
        try:
            yield
        finally:
            self._recording = False

    def take(self) -> torch.Tensor:
        """The mean, fp32 [batch, positions, width], of the pass recorded last; hands it over once."""
        if self._sum is None:
            raise RuntimeError("no forward pass was recorded: wrap it in `with tap.recording():`")
        mean, self._sum = self._sum.div_(self._count), None
        return mean

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
