"""What fused decoding refuses, and what an exported Copilot must not carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tc_ray.models.copilot import Copilot
from tc_ray.models.families import UnknownFamilyError, family_of
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import load_pilot
from tests.support.tiny_model import make_tiny_llama

PROMPT = torch.tensor([[5, 9, 30]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def fused(folder: Path) -> FusedModel:
    pilot = load_pilot(folder, dtype=torch.float32)
    return FusedModel.join(pilot, Copilot.from_decoder(folder, [0, 1], pilot=pilot))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": torch.tensor([0.1, 0.2])}, r"lam has shape \(2,\) for 1 sequences"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "no output_hidden_states"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no output_attentions"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size must stay unset"),
        ({"use_cache": False}, "use_cache must stay true"),
    ],
)
def test_refused_by_name(fused: FusedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused.generate(PROMPT, max_new_tokens=2, do_sample=False, **options)


def test_a_loaded_copilot_keeps_its_tables_frozen_and_no_path(fused: FusedModel, folder: Path, tmp_path: Path) -> None:
    fused.save_pretrained(tmp_path)
    loaded = Copilot.from_pretrained(tmp_path / "copilot")
    assert not loaded.question_embedding.weight.requires_grad and loaded.output.weight.requires_grad
    assert str(folder) not in (tmp_path / "copilot" / "config.json").read_text()
    assert "_name_or_path" not in loaded.config.decoder


def test_a_family_without_an_adapter_is_refused(folder: Path) -> None:
    from transformers import GPT2Config

    with pytest.raises(UnknownFamilyError, match=r"'gpt2' has no adapter .* llama, .* t5"):
        family_of(GPT2Config())


def test_a_score_without_the_length_of_the_prompt_is_refused(fused: FusedModel) -> None:
    """A fault found by attack: the default of 1, meant for encoder-decoders, scored the prompt as if it were an answer."""
    with pytest.raises(ValueError, match="give prompt_length"):
        fused.score(PROMPT)
    assert fused.score(PROMPT, prompt_length=1).fused_logprobs.shape == (1, 2)
