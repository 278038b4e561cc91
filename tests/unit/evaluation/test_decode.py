"""Completions: what the running batch decodes is what `generate` decodes, row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tc_ray.evaluation.decode import completions
from tc_ray.evaluation.statistics import Choice
from tc_ray.models.fusion import FusedModel
from tc_ray.models.weights import NotFiniteError
from tests.support.evaluation_samples import held_out, tiny_fused
from tests.support.family_samples import make_copilot, new_pilot
from tests.support.tiny_families import END
from tests.support.tiny_model import make_tokenizer

CHOICES: list[Choice] = [("logits", 0.8), ("probability", 0.0), ("probability", 0.6)]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    return tiny_fused(tmp_path_factory.mktemp("tiny"))


def alone(model: FusedModel, prompt: list[int], choice: Choice, new: int) -> str:
    """What `generate` says to one prompt."""
    model.space = choice[0]
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, lam=choice[1], eos_token_id=END, pad_token_id=0
    )
    begin = 1 if model.config.is_encoder_decoder else len(prompt)
    return str(make_tokenizer().decode(out[0, begin:], skip_special_tokens=True))


@pytest.mark.parametrize("feedback", ["own", "realised"])
def test_the_batch_says_what_generate_says(fused: FusedModel, feedback: str) -> None:
    """Several lambdas and spaces in one call, which share the computed prompts; each row as if alone."""
    fused.feedback = feedback
    rows = held_out(9)
    found = completions(fused, make_tokenizer(), rows, CHOICES, max_new_tokens=8)
    for row, of_row in zip(rows, found, strict=True):
        assert of_row == [alone(fused, row.prompt_ids, choice, 8) for choice in CHOICES]
    assert len({text for of_row in found for text in of_row}) > 9


def test_texts_end_at_the_end_token(fused: FusedModel) -> None:
    """With an end token that is often said, the answers are of unlike lengths, and none goes on."""
    tokenizer, rows = make_tokenizer(), held_out(9)
    long = completions(fused, tokenizer, rows, CHOICES[1:2], max_new_tokens=12)
    fused.space = CHOICES[1][0]
    token = int(fused.generate(torch.tensor([rows[0].prompt_ids]), max_new_tokens=12, do_sample=False, lam=0.0)[0, -5])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    found = [text for (text,) in completions(fused, tokenizer, rows, CHOICES[1:2], max_new_tokens=12)]
    assert any(len(text) < len(whole) for text, (whole,) in zip(found, long, strict=True))
    for text, (whole,) in zip(found, long, strict=True):
        assert whole.startswith(text)


def test_beams_and_encoder_decoders_use_generate(fused: FusedModel) -> None:
    fused.feedback, fused.space = "own", "probability"
    rows, tokenizer = held_out(), make_tokenizer()
    beams = completions(fused, tokenizer, rows, [("probability", 0.6)], max_new_tokens=8, num_beams=3)
    out = fused.generate(torch.tensor([rows[0].prompt_ids]), max_new_tokens=8, do_sample=False, lam=0.6, num_beams=3)
    assert beams[0] == [tokenizer.decode(out[0, rows[0].target_start :], skip_special_tokens=True)]
    copilot, _ = make_copilot("t5")
    seq2seq = FusedModel.join(new_pilot("t5"), copilot)
    sources = [replace(row, input_ids=[*row.prompt_ids, END], target_start=row.target_start + 1) for row in rows]
    together = completions(seq2seq, tokenizer, sources, [("probability", 0.8), ("probability", 0.0)], max_new_tokens=6)
    for row, (text, _) in zip(sources, together, strict=True):
        assert text == alone(seq2seq, row.prompt_ids, ("probability", 0.8), 6)
    assert any(one != other for one, other in together)


def test_a_pilot_without_a_copilot(fused: FusedModel) -> None:
    rows, tokenizer = held_out(), make_tokenizer()
    choice = [("probability", 0.0)]
    assert completions(fused.pilot, tokenizer, rows, choice, max_new_tokens=6) == completions(
        fused, tokenizer, rows, choice, max_new_tokens=6
    )


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    broken = tiny_fused(tmp_path)
    with torch.no_grad():
        broken.pilot.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        completions(broken, make_tokenizer(), held_out(), [("logits", 0.5)], max_new_tokens=3)
