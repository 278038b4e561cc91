"""The running batch: whatever joins and leaves beside it, a sequence gets the tokens that `generate` gives it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tc_ray.models.decoding.alone import PilotAlone
from tc_ray.models.decoding.batch import CacheNeed, FusedBatch
from tc_ray.models.decoding.kv_rows import RowStore
from tc_ray.models.decoding.prefill import Prefill, advance_together, encoded
from tc_ray.models.fusion import FusedModel
from tests.support.family_samples import PAPER, make_copilot, new_pilot, output_ids, quiet
from tests.support.tiny_families import DECODER_ONLY, ENCODER_DECODER, VOCAB

NEW = 14
PROMPTS = [
    torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (7, 25, 3, 12, 9, 1, 18)
]
LAMS = (0.5, 0.0, 1.0, 0.8, 0.0, 0.3, 1.0)
ARRIVALS = (0, 0, 2, 3, 9, 11, 20)
"""Step before which each prompt joins."""


def fused_model(family: str, **given: Any) -> FusedModel:
    quiet()
    settings = {name: given.pop(name) for name in ("space", "feedback") if name in given}
    pilot = new_pilot(family)
    copilot, _ = make_copilot(family, **given)
    return FusedModel.join(pilot, copilot, **settings)


def alone(model: FusedModel, prompt: list[int], lam: float, new: int) -> tuple[list[int], torch.Tensor]:
    """Tokens of greedy `generate` without an end token, and its logits [n, V]."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        lam=lam,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, -new:].tolist(), torch.cat(out.logits)


def run_together(
    model: FusedModel | PilotAlone, prefill_tokens: int = 1000, lams: Sequence[float] = LAMS
) -> list[tuple[list[int], torch.Tensor]]:
    """Every prompt of PROMPTS through one batch, each joining at its time and leaving after NEW tokens."""
    batch = FusedBatch(model)
    tokens: dict[int, list[int]] = {}
    logits: dict[int, list[torch.Tensor]] = {}
    order: list[int] = []
    needs: dict[int, CacheNeed] = {}
    time = 0
    while len(tokens) < len(PROMPTS) or order:
        for number in (i for i, arrival in enumerate(ARRIVALS) if arrival == time):
            question = encoded(model, PROMPTS[number]) if model.family.encoder_decoder else None
            prefill = Prefill(model, PROMPTS[number], lams[number], question=question)
            while not prefill.done:
                assert prefill.advance(prefill_tokens) > 0
            needs[number] = batch.need(len(PROMPTS[number]), NEW, lams[number] != 0)
            batch.reserve([needs[i] for i in (*order, number)])
            assert batch.nbytes == batch.planned_bytes([needs[i] for i in (*order, number)])
            assert batch.join(prefill) == len(order)
            order.append(number)
            tokens[number], logits[number] = [int(prefill.fused.argmax())], [prefill.fused]
        if order:
            step = batch.step([tokens[number][-1] for number in order])
            for row, number in enumerate(order):
                tokens[number].append(int(step.fused[row].argmax()))
                logits[number].append(step.fused[row : row + 1])
        for row in reversed(range(len(order))):
            if len(tokens[order[row]]) == NEW:
                batch.leave(row)
                order[row] = order[-1]
                order.pop()
        time += 1
    return [(tokens[i], torch.cat(logits[i])) for i in range(len(PROMPTS))]


SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "some tokens, early": {"output_ids": output_ids(), "pattern": "early"},
    "logits, realised": {"output_ids": output_ids(), "space": "logits", "feedback": "realised"},
    "narrow, target, all": {"base": "narrow", "positions": "target", "pattern": "all", "producing_state": "memory"},
    "the paper": PAPER,
}
CASES = [(family, "full") for family in (*DECODER_ONLY, *ENCODER_DECODER)]
CASES += [("t5", "the paper"), ("flan_t5", "logits, realised"), ("t5", "narrow, target, all")]
CASES += [(family, name) for name in SETTINGS for family in ("llama3", "gemma2") if name != "full"]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_each_sequence_is_as_if_alone(family: str, name: str) -> None:
    model = fused_model(family, **SETTINGS[name])
    for number, (tokens, logits) in enumerate(run_together(model)):
        expected, expected_logits = alone(model, PROMPTS[number], LAMS[number], NEW)
        assert tokens == expected, number
        # fp32 sums in another order, which feedback through random weights amplifies from row to row (0.002 by the last one on
        # some processors); where a probability is clamped, a tiny one may fall on either side of 0
        found, wanted = logits.softmax(1), expected_logits.softmax(1)
        torch.testing.assert_close(found[:4], wanted[:4], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pilot_without_a_copilot_decodes_too(family: str) -> None:
    pilot = new_pilot(family)
    for number, (tokens, _) in enumerate(run_together(PilotAlone(pilot), lams=[0.0] * len(PROMPTS))):
        ids = torch.tensor([PROMPTS[number]])
        out = pilot.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens == out[0, len(PROMPTS[number]) :].tolist()


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[0] in DECODER_ONLY])
def test_prompts_computed_in_one_pass_are_as_if_alone(family: str, name: str) -> None:
    """Lengths from 1 to 25, lambda 0 among others; with windows (gemma) shorter than a prompt."""
    model = fused_model(family, **SETTINGS[name])
    prefills = [Prefill(model, prompt, lam) for prompt, lam in zip(PROMPTS, LAMS, strict=True)]
    assert advance_together(prefills) == len(PROMPTS) * 25
    batch = FusedBatch(model)
    batch.reserve([batch.need(len(prompt), 8, lam != 0) for prompt, lam in zip(PROMPTS, LAMS, strict=True)])
    for prefill in prefills:
        assert prefill.done
        batch.join(prefill)
    logits = [torch.cat([prefill.fused for prefill in prefills])]
    for _ in range(7):
        logits.append(batch.step(logits[-1].argmax(1).tolist()).fused)
    for number, prompt in enumerate(PROMPTS):
        tokens, expected = alone(model, prompt, LAMS[number], 8)
        found = torch.stack([step[number] for step in logits])
        assert found.argmax(1).tolist() == tokens, number
        torch.testing.assert_close(found[:4].softmax(1), expected[:4].softmax(1), atol=1e-4, rtol=1e-3)
        prefix = prefills[number].prefix()
        if prefix is not None:  # another prompt goes on with what is its own, and holds none of the padding
            assert prefix.states.shape[1] == len(prompt) and prefix.entries[0][0].shape[2] == len(prompt)
            assert prefix.states.untyped_storage().nbytes() == prefix.states.nbytes


def test_a_pilot_alone_computes_prompts_in_one_pass() -> None:
    model = PilotAlone(new_pilot("llama"))
    prefills = [Prefill(model, prompt, 0.0) for prompt in PROMPTS]
    advance_together(prefills)
    for prompt, prefill in zip(PROMPTS, prefills, strict=True):
        by_itself = Prefill(model, prompt, 0.0)
        by_itself.advance(100)
        torch.testing.assert_close(prefill.pilot, by_itself.pilot, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_computed_in_parts_is_the_same(family: str) -> None:
    model = fused_model(family)
    whole, parts = run_together(model), run_together(model, prefill_tokens=4)
    assert [tokens for tokens, _ in whole] == [tokens for tokens, _ in parts]


def test_a_prompt_may_begin_with_anothers_prefix() -> None:
    model = fused_model("llama", output_ids=output_ids())
    first = Prefill(model, PROMPTS[1], 0.0)
    first.advance(100)
    prefix = first.prefix()
    assert prefix is not None and prefix.nbytes > 0
    for prompt, reused in ((PROMPTS[1][:20] + PROMPTS[0], 20), (PROMPTS[1], len(PROMPTS[1]) - 1), (PROMPTS[2], 0)):
        again = Prefill(model, prompt, 0.7, prefix=prefix)
        assert again.reused == reused
        assert again.advance(100) == len(prompt) - reused
        plain = Prefill(model, prompt, 0.7)
        plain.advance(100)
        torch.testing.assert_close(again.fused.exp(), plain.fused.exp(), atol=1e-5, rtol=1e-4)


def test_a_computed_prompt_serves_every_lambda() -> None:
    """Logits and tokens of a prompt that was computed once are those of one computed for each lambda and space."""
    model = fused_model("llama", output_ids=output_ids())
    once = Prefill(model, PROMPTS[1], 1.0)
    once.advance(100)
    for space, lam in (("probability", 0.0), ("probability", 0.3), ("logits", 0.8), ("logits", 1.0)):
        model.space = space
        alone = Prefill(model, PROMPTS[1], lam)
        alone.advance(100)
        decoded = []
        for prompt in (once.weighted(lam), alone):
            torch.testing.assert_close(prompt.fused, alone.fused)
            batch = FusedBatch(model)
            batch.reserve([batch.need(len(PROMPTS[1]), 8, lam != 0)])
            batch.join(prompt)
            tokens = [int(prompt.fused.argmax())]
            for _ in range(7):
                tokens.append(int(batch.step(tokens[-1:]).fused.argmax()))
            decoded.append(tokens)
        assert decoded[0] == decoded[1]


def test_windows_keep_no_prefix() -> None:
    prefill = Prefill(fused_model("gemma3"), PROMPTS[1], 0.0)
    prefill.advance(100)
    assert prefill.prefix() is None


def test_a_store_shrinks_and_grows() -> None:
    store = RowStore(1, 1, 2, torch.float32, torch.device("cpu"))
    store.reserve(2, 10)
    assert store.nbytes == store.planned_bytes(2, 10) == 8 * 64 * store.bytes_per_entry

    def entries(count: int, value: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.full((1, 1, count, 2), value), torch.full((1, 1, count, 2), -value))]

    store.join(entries(3, 1.0), 3)
    store.join(entries(60, 2.0), 60)
    with pytest.raises(ValueError, match="does not fit"):
        store.join(entries(65, 3.0), 65)
    assert store.lengths() == [3, 60]
    with pytest.raises(ValueError, match="do not fit"):
        store.ensure_columns(5)
    store.leave(1)
    store.ensure_columns(5)
    keys, values = store.write(0, torch.full((1, 1, 5, 2), 7.0), torch.full((1, 1, 5, 2), -7.0))
    store.advance(5)
    assert keys[0, 0, :, 0].tolist() == [1.0] * 3 + [7.0] * 5
    assert torch.equal(values, -keys)
    store.reserve(1, 70)
    assert store.lengths() == [8] and store.nbytes == store.planned_bytes(1, 70)
    with pytest.raises(ValueError, match="do not fit into"):
        store.reserve(0, 0)
