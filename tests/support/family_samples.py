"""Pilots, Copilots and prompts of every family that the tests of tests/unit/test_families_*.py share.

Models are made and loaded once a process, from a temporary folder. `reference_model` is the library's own and only read;
of what the product changes (taps, adapters, gradients) each caller gets a copy.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tc_ray.config.training import PAPER_FORM, CopilotSection
from tc_ray.models.copilot import Copilot
from tc_ray.models.pilot.load import load_pilot
from tests.support.family_reference import Made
from tests.support.tiny_families import ENCODER_DECODER, VOCAB, load, make_narrow, make_pilot

PADDED = VOCAB + 12
LAYERS = {"alternate": (0, 1, 3), "early": (1, 2, 3), "late": (0, 2, 3), "all": (1, 2)}
"""Layers of the Pilot that the Copilot of each insertion pattern is made of; with the patterns they leave sliding and full
layers of self-attention and of attention to the memory."""

PAPER = {name: PAPER_FORM[name] for name in CopilotSection().form()}
"""The paper's form, and each of its departures from the default alone."""
FORMS = [{name: value} for name, value in PAPER.items() if getattr(CopilotSection(), name) != value]

_COPILOTS: dict[tuple[str, ...], Copilot] = {}


def quiet() -> None:
    """transformers says much about tiny models."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@cache
def _root() -> Path:
    quiet()
    folder = Path(tempfile.mkdtemp(prefix="tc-ray-families-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def folder_of(family: str, kind: str = "pilot") -> Path:
    """kind: `pilot`, `narrow`, or either with `-padded`: a vocabulary of 270 instead of 258."""
    make = make_narrow if kind.startswith("narrow") else make_pilot
    return make(family, _root() / f"{family}-{kind}", vocab=PADDED if kind.endswith("padded") else VOCAB)


@cache
def reference_model(family: str, kind: str = "pilot") -> Any:
    """The library's model, for the reference."""
    return load(folder_of(family, kind))


@cache
def _loaded(family: str, kind: str, dtype: torch.dtype) -> Any:
    return load_pilot(folder_of(family, kind), dtype=dtype).eval()


def new_pilot(family: str, kind: str = "pilot", dtype: torch.dtype = torch.float32) -> Any:
    """The Pilot as the product loads it."""
    return copy.deepcopy(_loaded(family, kind, dtype))


def output_ids(vocab: int = VOCAB) -> torch.Tensor:
    """A part of the vocabulary for f."""
    return torch.randperm(vocab, generator=torch.Generator().manual_seed(4))[:120].sort().values


def make_copilot(
    family: str, *, base: str = "pilot", pilot: str = "pilot", pattern: str = "alternate", **given: Any
) -> tuple[Copilot, Made]:
    """A Copilot with weights like a trained one's, and how it was made."""
    if base.startswith("narrow"):
        layers = (0, 1) if family in ENCODER_DECODER else (0, 1, 2)
    else:
        layers = (1, 2) if family in ENCODER_DECODER else LAYERS[pattern]
    given |= {} if family in ENCODER_DECODER else {"pattern": pattern}
    key = family, base, pilot, *(f"{k}={v.tolist() if isinstance(v, torch.Tensor) else v}" for k, v in given.items())
    if key not in _COPILOTS:
        pilot_model = _loaded(family, pilot, torch.float32)
        torch.manual_seed(6)  # the weights that are new, whatever ran before
        _COPILOTS[key] = shaken(Copilot.from_decoder(folder_of(family, base), layers, pilot=pilot_model, **given))
    form = {name: value for name, value in given.items() if name in PAPER}
    made = Made(reference_model(family, pilot), reference_model(family, base), layers, pattern, form)
    return copy.deepcopy(_COPILOTS[key]), made


@torch.no_grad()
def shaken(copilot: Copilot, seed: int = 5) -> Copilot:
    """No identity, zero or tiny matrix is left that would hide a wrong order or shift. f has a standard deviation of about
    0.15, so that it often but not always overrules the Pilot."""
    torch.manual_seed(seed)
    for module in (copilot.error_projection, copilot.state_projection, copilot.memory_projection):
        if isinstance(module, nn.Linear):
            module.weight.add_(0.3 * torch.randn_like(module.weight))
    if copilot.free_input:
        copilot.error_embedding.weight.normal_(std=0.5)
    if copilot.start is not None:
        copilot.start.weight.add_(0.5 * torch.randn_like(copilot.start.weight))
    for norm in (copilot.question_norm, copilot.rationale_norm):
        if isinstance(norm, nn.RMSNorm):
            norm.weight.mul_(1 + 0.3 * torch.randn_like(norm.weight))
    last = copilot.stack.final_layer_norm if copilot.encoder_decoder else copilot.stack.norm
    gain = last.weight + 1 if copilot.config.decoder["model_type"].startswith("gemma") else last.weight
    size = float(gain.square().mean().sqrt()) * copilot.output_scale * copilot.output.in_features**0.5
    copilot.output.weight.normal_(std=0.15 / size)
    return copilot.eval()


def prompts(count: int = 3, seed: int = 11) -> list[list[int]]:
    """Prompts of unlike lengths, longer and shorter than the windows."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, length).tolist() for length in (7, 12, 3, 9)[:count]]


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids and mask [B, S]."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def spoken(model: Any, out: torch.Tensor, prompt_length: int) -> list[list[int]]:
    """What `generate` added: for an encoder-decoder all but the start token."""
    return out[:, 1 if model.config.is_encoder_decoder else prompt_length :].tolist()
