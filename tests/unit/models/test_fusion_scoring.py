"""`FusedModel.score` against the slow reference of tests/support/family_reference.py and against decoding step by step.

Tolerance where none is given: 1e-5 relative to the largest entry; both sides are float32 and add the same numbers in another order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tc_ray.models.fusion import FusedModel
from tc_ray.models.fusion import scoring as score_module
from tests.support.family_reference import Fusion, pilot_pass
from tests.support.family_samples import left_padded, make_copilot, new_pilot, prompts, reference_model
from tests.support.reference_samples import close
from tests.support.tiny_families import ENCODER_DECODER, END, VOCAB

FAMILIES = ("llama", "qwen2_sliding", "gemma2", "gemma3", "t5", "flan_t5")
VARIANTS = (("probability", "own"), ("probability", "realised"), ("logits", "own"), ("logits", "realised"))
LENGTHS = (9, 1, 6)
LAM = (0.7, 0.0, 0.4)


@cache
def joined(family: str, **given: Any) -> tuple[FusedModel, Any]:
    """The fused model and how its Copilot was made."""
    copilot, made = make_copilot(family, **given)
    return FusedModel.join(new_pilot(family), copilot), made


def fused_model(family: str, space: str = "probability", feedback: str = "own", **given: Any) -> FusedModel:
    fused, _ = joined(family, **given)
    fused.space, fused.feedback = space, feedback
    return fused


@cache
@torch.no_grad()
def targets(family: str) -> list[list[int]]:
    """Completions of unlike lengths without an end token: in turn what the Pilot is surest of, and any token."""
    torch.manual_seed(2)
    model, said = reference_model(family), []
    for prompt, length in zip(prompts(), LENGTHS, strict=True):
        tokens: list[int] = []
        for place in range(length):
            likely = pilot_pass(model, prompt, tokens).logits[-1, 2:].argmax() + 2
            tokens.append(int(torch.randint(2, VOCAB, ()) if place % 2 else likely))
        said.append(tokens)
    return said


def padded(rows: list[list[int]], filler: int = 0) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def scored(fused: FusedModel, asked: list[list[int]], said: list[list[int]], lam: Any) -> Any:
    """One batch of prompts padded on the left and completions on the right."""
    ids, mask = left_padded(asked)
    after = padded([[1] * len(row) for row in said])
    if fused.config.is_encoder_decoder:
        start = torch.zeros(len(said), 1, dtype=torch.long)
        return fused.score(
            torch.cat([start, padded(said)], 1),
            source=ids,
            source_mask=mask,
            attention_mask=torch.cat([start + 1, after], 1),
            lam=lam,
        )
    sequences = torch.cat([ids, padded(said)], 1)
    return fused.score(sequences, prompt_length=ids.shape[1], attention_mask=torch.cat([mask, after], 1), lam=lam)


def same_log_probs(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """As probabilities, and as logs where these are not so small that clamping at 0 made them."""
    torch.testing.assert_close(actual.exp(), expected.exp(), rtol=0, atol=5e-6)
    large = expected > -7
    assert large.any()
    torch.testing.assert_close(actual[large], expected[large], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("space", "feedback"), VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_reference_s(family: str, space: str, feedback: str) -> None:
    """Every token of a padded batch with a lambda for each sequence."""
    fused, (_, made) = fused_model(family, space, feedback), joined(family)
    asked, said = prompts(), targets(family)
    weights = LAM if space == "probability" else tuple(5 * lam for lam in LAM)
    out = scored(fused, asked, said, torch.tensor(weights))
    moved = 0.0
    for row, (prompt, tokens, lam) in enumerate(zip(asked, said, weights, strict=True)):
        n = len(tokens)
        assert out.mask[row].tolist() == [True] * n + [False] * (max(LENGTHS) - n)
        assert out.tokens[row, :n].tolist() == tokens
        for found, weight in ((out.pilot_logprobs, 0.0), (out.fused_logprobs, lam)):
            reference = Fusion(made.pilot, fused.copilot, made, weight, space, feedback)
            logits = reference.logits(prompt, tokens[:-1])
            wanted = logits.log_softmax(-1)[torch.arange(n), torch.tensor(tokens)]
            same_log_probs(found[row, :n], wanted)
            assert found[row, n:].tolist() == [0.0] * (max(LENGTHS) - n)
        moved = max(moved, float((out.fused_logprobs - out.pilot_logprobs)[row].exp().sub(1).abs().max()))
    assert moved > 0.1, "the Copilot changes nothing: the comparison proves nothing"


@pytest.mark.parametrize("feedback", ["own", "realised"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_scores_are_those_of_cached_decoding(family: str, feedback: str) -> None:
    """Token by token through the caches, each sequence alone."""
    fused = fused_model(family, "logits", feedback)
    asked, said = prompts(), targets(family)
    out = scored(fused, asked, said, 2.0)
    for row, (prompt, tokens) in enumerate(zip(asked, said, strict=True)):
        cache, source = fused.new_cache(), torch.tensor([prompt])
        given = torch.tensor([[0]]) if family in ENCODER_DECODER else source
        steps = []
        for token in tokens:
            inputs = (
                {"input_ids": source, "decoder_input_ids": given} if family in ENCODER_DECODER else {"input_ids": given}
            )
            logits = fused(**inputs, past_key_values=cache, lam=2.0).logits[0, -1]
            steps.append(logits.log_softmax(-1)[token])
            given = torch.tensor([[token]])
        close(out.fused_logprobs[row, : len(tokens)], torch.stack(steps))


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "t5"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_pieces_change_nothing(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fused_model(family)
    whole = scored(fused, prompts(), targets(family), 0.6)
    monkeypatch.setattr(score_module, "CHUNK_ELEMENTS", rows * 3 * VOCAB)
    pieces = scored(fused, prompts(), targets(family), 0.6)
    same_log_probs(pieces.fused_logprobs, whole.fused_logprobs)
    close(pieces.pilot_logprobs, whole.pilot_logprobs)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.found = max([self.found, *sizes])
        return out


def test_long_completions_need_no_tensor_of_their_size_times_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, rows = fused_model("llama"), 4
    monkeypatch.setattr(score_module, "CHUNK_ELEMENTS", rows * VOCAB)
    ids = torch.randint(2, VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    fused.score(ids, prompt_length=10)  # what is made once (the feedback's matrix) is made here
    with LargestTensor() as largest:
        fused.score(ids, prompt_length=10)
    assert rows * VOCAB <= largest.found < 190 * VOCAB / 4


def test_lambda_zero_is_the_pilot_s_own(family: str = "llama") -> None:
    fused = fused_model(family)
    prompt, tokens = prompts()[0], targets(family)[0]
    ids = torch.tensor([prompt + tokens])
    out = fused.score(ids, prompt_length=len(prompt), lam=0.0)
    assert torch.equal(out.pilot_logprobs, out.fused_logprobs)
    logits = fused.pilot(ids).logits[0, len(prompt) - 1 : -1]
    close(out.pilot_logprobs[0], logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_completion_ends_with_its_first_end_token(family: str) -> None:
    fused = fused_model(family)
    said = [[40, 50, END, 60, END], [END, 0, 0, 0, 0], [7, 8, 9, 10, 11]]
    ids, mask = left_padded(prompts())
    if family in ENCODER_DECODER:
        sequences = torch.cat([torch.zeros(3, 1, dtype=torch.long), torch.tensor(said)], 1)
        out = fused.score(sequences, source=ids, source_mask=mask, lam=0.5)
    else:
        out = fused.score(torch.cat([ids, torch.tensor(said)], 1), prompt_length=12, attention_mask=mask, lam=0.5)
    assert out.mask.sum(1).tolist() == [3, 1, 5]
    assert bool(((out.pilot_logprobs != 0) == out.mask).all())
    alone = scored(fused, prompts(), [row[:n] for row, n in zip(said, (3, 1, 5), strict=True)], 0.5)
    same_log_probs(out.fused_logprobs, alone.fused_logprobs)


def test_a_forced_prefix_of_the_target() -> None:
    """Every position of an encoder-decoder makes a row, also those of a prefix that is not scored."""
    fused = fused_model("t5", "logits")
    tokens, source = targets("t5")[0], torch.tensor([prompts()[0]])
    sequences = torch.tensor([[0, *tokens]])
    whole = fused.score(sequences, source=source, lam=0.6)
    rest = fused.score(sequences, source=source, prompt_length=4, lam=0.6)
    assert rest.tokens[0].tolist() == tokens[3:]
    close(rest.fused_logprobs, whole.fused_logprobs[:, 3:])
    close(rest.pilot_logprobs, whole.pilot_logprobs[:, 3:])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_states_of_the_target_only(family: str) -> None:
    """A Copilot trained on the states of the target sees no state of the prompt."""
    fused = fused_model(family, positions="target")
    _, made = joined(family, positions="target")
    prompt, tokens = prompts()[1], targets(family)[0]
    out = scored(fused, [prompt], [tokens], 0.7)
    reference = Fusion(made.pilot, fused.copilot, made, 0.7, positions="target")
    wanted = reference.logits(prompt, tokens[:-1]).log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    same_log_probs(out.fused_logprobs[0], wanted)


def test_bf16_is_near_fp32() -> None:
    """bf16 keeps 8 bits: logits of size 10 are off by a few hundredths, and so are log-probabilities."""
    copilot, _ = make_copilot("llama")
    half = FusedModel.join(new_pilot("llama", dtype=torch.bfloat16), copilot.bfloat16(), space="logits")
    exact = fused_model("llama", "logits")
    one, other = (scored(model, prompts(), targets("llama"), 1.0) for model in (half, exact))
    assert one.fused_logprobs.dtype == torch.float32
    for found, wanted in ((one.pilot_logprobs, other.pilot_logprobs), (one.fused_logprobs, other.fused_logprobs)):
        assert float((found - wanted).abs().mean()) < 0.15
        assert float((found - wanted).abs().max()) < 0.6


def test_arguments_that_do_not_fit() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    llama, t5 = fused_model("llama"), fused_model("t5")
    for column in (0, 5):
        with pytest.raises(ValueError, match=f"begin at column {column}: it must be from 1 to 4"):
            llama.score(ids, prompt_length=column)
    with pytest.raises(ValueError, match="decoder-only model has no source"):
        llama.score(ids, prompt_length=2, source=ids)
    with pytest.raises(ValueError, match="needs `source`"):
        t5.score(ids)


def test_nothing_to_score() -> None:
    out = fused_model("llama").score(torch.tensor([[5, 6, 7]]), prompt_length=3)
    assert out.pilot_logprobs.shape == out.fused_logprobs.shape == out.mask.shape == (1, 0)
