"""Try a Copilot on a synthetic batch: an exported one must be the trained one, a loaded one must predict sane errors.

Invariant: the batch follows from the Copilot's config alone. Called by the learner before it publishes a folder, and by serving.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tc_ray.models.copilot.batch import CopilotBatch
from tc_ray.models.copilot.model import Copilot
from tc_ray.models.copilot.stacks import CopilotConfig
from tc_ray.models.families import family_of
from tc_ray.models.weights import ExportMismatchError, NotFiniteError

TOLERANCE = 1e-3
"""Largest difference of a predicted error, as a share of the largest one: fp32, products added in another order."""
MAX_PREDICTION = 1e3
"""An error lies between -1 and 1; a Copilot that predicts one of this size is not a trained one."""
_RECORDS, _PROMPT, _ROWS, _ENTRIES = 2, 4, 5, 3


def probe_batch(config: CopilotConfig) -> CopilotBatch:
    """Records drawn by a fixed seed, as a log of this Copilot's Pilot could hold them."""
    dice = torch.Generator().manual_seed(0)
    rows = torch.arange(_ROWS).expand(_RECORDS, -1) + _PROMPT - 1
    first = 0 if config.positions == "all" else _PROMPT - 1
    position = torch.arange(first, _PROMPT + _ROWS - 1).expand(_RECORDS, -1)
    wide = (_RECORDS, position.shape[1], config.pilot_hidden_size)
    asked = (_RECORDS, _PROMPT, config.pilot_hidden_size)
    given = family_of(config.decoder_config()).encoder_decoder or config.question == "states"
    return CopilotBatch(
        question_ids=torch.randint(config.vocab_size, (_RECORDS, _PROMPT), generator=dice),
        question_mask=torch.ones(_RECORDS, _PROMPT, dtype=torch.bool),
        rationale=torch.randn(wide, generator=dice).to(torch.bfloat16),
        rationale_position=position,
        row_position=rows,
        error_ids=torch.randint(config.vocab_size, (_RECORDS, _ROWS, _ENTRIES), generator=dice),
        error_values=torch.rand(_RECORDS, _ROWS, _ENTRIES, generator=dice) - 0.5,
        question=torch.randn(asked, generator=dice).to(torch.bfloat16) if given else None,
    )


@torch.no_grad()
def answers(copilot: Copilot) -> torch.Tensor:
    """f of `probe_batch` on the output tokens, [N, A] in fp32 on the CPU; the model must be in evaluation mode."""
    return copilot.compact(probe_batch(copilot.config).to(copilot.output.weight.device)).float().cpu()


def check_export(trained: torch.Tensor, folder: Path) -> None:
    """Load a folder again and compare it with `answers` of the trained Copilot. Raises ExportMismatchError if they differ."""
    found = answers(Copilot.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval())
    apart, size = float((found - trained).abs().max()), float(trained.abs().max())
    # not "greater than": NaN is never close
    if not apart <= TOLERANCE * max(size, 1e-3):
        raise ExportMismatchError(
            f"the exported Copilot is not the trained one and was not published: a prediction of {folder} differs by {apart:.2g}, "
            f"the largest is {size:.2g}. It cannot be exported with these settings of copilot.method and copilot.lora"
        )


def check_answers(copilot: Copilot, where: str) -> None:
    """Raise NotFiniteError for a Copilot whose predictions are not finite, or absurd. In evaluation mode."""
    largest = float(answers(copilot).abs().max())
    if not largest <= MAX_PREDICTION:
        raise NotFiniteError(
            f"{where}: the Copilot predicts errors of size {largest:g} in a trial, but an error lies between -1 and 1: its "
            "weights are spoilt"
        )
