"""Records and Copilots of every family (batched, hooked, sparse) against tests/support/family_reference.py.

Tolerance where none is given: 1e-5 relative to the largest entry. Both sides are float32 and add the same numbers in another
order; a wrong norm, mask, shift, scale or position shows in the first digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.pilot.step import PilotStep
from tests.support import family_reference
from tests.support.family_reference import Made, copilot_f, embedding_table, pilot_pass
from tests.support.family_samples import (
    FORMS,
    LAYERS,
    PAPER,
    folder_of,
    make_copilot,
    new_pilot,
    output_ids,
    quiet,
    reference_model,
)
from tests.support.reference_samples import close, dense_errors
from tests.support.tiny_families import DECODER_ONLY, ENCODER_DECODER, FAMILIES, VOCAB

quiet()

# (length, target start): one target, many targets after one prompt token, the longest in the middle of the batch
SHAPES = [(9, 8), (13, 1), (19, 6), (5, 3)]


def examples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids [B, S] right padded, lengths, target_start."""
    rng = np.random.default_rng(3)
    ids = torch.zeros(len(SHAPES), max(length for length, _ in SHAPES), dtype=torch.int64)
    for row, (length, _) in enumerate(SHAPES):
        ids[row, :length] = torch.from_numpy(rng.integers(2, VOCAB, length))
    return ids, torch.tensor([length for length, _ in SHAPES]), torch.tensor([start for _, start in SHAPES])


def batch_of(
    pilot: Any, *, positions: str = "all", top_k: int = 10 * VOCAB, pooling: str = "mean", question: str = "ids"
) -> CopilotBatch:
    inputs = examples()
    record = PilotStep(pilot, top_k=top_k, pooling=pooling, question=question == "states").measure(*inputs).record
    assert record is not None
    return CopilotBatch.from_step(record, *inputs, positions=positions)


# -- records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "pooling"),
    [*((family, "mean") for family in FAMILIES), *((f, p) for f in ("gemma3", "t5") for p in ("max", "sum"))],
)
def test_records(family: str, pooling: str) -> None:
    """Errors of every token, loss, pooled states and the question, for sequences of unlike lengths in one batch."""
    ids, lengths, starts = examples()
    measured = PilotStep(new_pilot(family), top_k=10 * VOCAB, pooling=pooling).measure(ids, lengths, starts)
    record, first = measured.record, 0
    assert record is not None and record.rationale.dtype == torch.float32
    errors = dense_errors(record.errors.ids, record.errors.values, VOCAB)
    for row, (length, start) in enumerate(SHAPES):
        prompt, target = ids[row, :start].tolist(), ids[row, start:length].tolist()
        seen = pilot_pass(reference_model(family), prompt, target[:-1], pooling)
        rows = slice(first, first + len(target))
        expected = family_reference.dense_errors(seen.logits, target)
        close(errors[rows], expected)
        losses = [-float(r.log_softmax(-1)[t]) for r, t in zip(seen.logits, target, strict=True)]
        torch.testing.assert_close(record.token_loss[rows], torch.tensor(losses), rtol=1e-4, atol=1e-5)
        assert record.token_correct[rows].tolist() == (seen.logits.argmax(-1) == torch.tensor(target)).tolist()
        close(record.rationale[row, seen.positions], seen.states)
        if family in ENCODER_DECODER:
            assert record.question is not None
            close(record.question[row, :start], seen.question)
            others = [i for i in range(ids.shape[1]) if i not in seen.positions]
            assert float(record.rationale[row, others].abs().max()) == 0.0
        else:
            assert record.question is None
        first += len(target)
    assert first == len(record.token_loss)


# -- f ------------------------------------------------------------------------------------------------------------


def reference_f(copilot: Copilot, made: Made, batch: CopilotBatch) -> torch.Tensor:
    """f [N, V] of a batch, one sequence after the other; states and questions as the batch has them (bfloat16)."""
    found = []
    for row in range(len(batch.rationale)):
        real = batch.rationale_position[row] >= 0
        count = int(batch.row_mask[row].sum())
        question = embedding_table(made.pilot)[batch.question_ids[row]]
        if batch.question is not None:
            question = batch.question[row].float()
        found.append(
            copilot_f(
                copilot,
                made,
                question[batch.question_mask[row]],
                batch.rationale[row][real].float(),
                batch.rationale_position[row][real].tolist(),
                batch.row_position[row, :count].tolist(),
                dense_errors(batch.error_ids[row, :count], batch.error_values[row, :count], copilot.config.vocab_size),
            )
        )
    return torch.cat(found)


def unreachable(copilot: Copilot, made: Made) -> set[str]:
    """Weights that f does not depend on: a bias of the keys (Qwen2) that are not rotated adds the same to all scores of a row."""
    names = {f"stack.layers.{j}.self_attn.k_proj.bias" for j in range(len(made.layers)) if made.attends_to_memory(j)}
    return names & {name for name, _ in copilot.named_parameters()}


def check(copilot: Copilot, made: Made, batch: CopilotBatch) -> None:
    """f, and the gradients of a scalar that every entry of f is in, against the reference's."""
    torch.manual_seed(2)
    weights = torch.randn(int(batch.row_mask.sum()), copilot.config.vocab_size)
    copilot.zero_grad()
    f = copilot(batch)
    (f * weights).sum().backward()
    gradients = {name: p.grad for name, p in copilot.named_parameters() if p.requires_grad}
    copilot.zero_grad()
    expected = reference_f(copilot, made, batch)
    (expected * weights).sum().backward()
    close(f, expected)
    for name, parameter in copilot.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        gradient = gradients[name]
        assert gradient is not None and parameter.grad is not None
        if name in unreachable(copilot, made):
            assert float(gradient.abs().max()) < 1e-3  # noise of sums that cancel; others are 1 to 1000
        else:
            assert float(gradient.abs().max()) > 1e-2, f"{name} is not reached"
            close(gradient, parameter.grad, 5e-5)  # a product of several sums of that tolerance


@pytest.mark.parametrize("pattern", LAYERS)
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_f_and_gradients_for_every_pattern(family: str, pattern: str) -> None:
    copilot, made = make_copilot(family, pattern=pattern)
    check(copilot, made, batch_of(new_pilot(family)))


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_f_and_gradients_of_encoder_decoders(family: str) -> None:
    copilot, made = make_copilot(family)
    check(copilot, made, batch_of(new_pilot(family)))


@pytest.mark.parametrize(
    ("pilot", "base"), [("pilot", "narrow"), ("pilot-padded", "narrow"), ("pilot", "narrow-padded")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_copilot_of_another_size(family: str, pilot: str, base: str) -> None:
    """Narrower, other heads, and vocabularies padded on either side: token ids are what aligns them."""
    copilot, made = make_copilot(family, base=base, pilot=pilot)
    assert copilot.config.vocab_size == made.pilot.config.vocab_size
    check(copilot, made, batch_of(new_pilot(family, pilot), top_k=6))


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
@pytest.mark.parametrize(
    "given",
    [
        {"producing_state": "memory"},
        {"positions": "target"},
        {"pooling": "max"},
        {"output_ids": output_ids()},
        {"question": "states"},
        *FORMS,
        PAPER,
        {**PAPER, "question": "states"},
    ],
    ids=lambda given: (
        f"paper {len(given)}" if PAPER.items() <= given.items() else "-".join(map(str, next(iter(given.items()))))
    ),
)
def test_variants(family: str, given: dict[str, Any]) -> None:
    copilot, made = make_copilot(family, **given)
    of_the_log = {name: given[name] for name in ("positions", "pooling", "question") if name in given}
    pilot = new_pilot(family)
    if "question" in given:  # the embedding has moved since the Copilot was made: X~ is that of the round
        with torch.no_grad():
            pilot.get_input_embeddings().weight.mul_(1.5)
    batch = batch_of(pilot, top_k=6, **of_the_log)
    if "question" in given and family not in ENCODER_DECODER:
        assert batch.question is not None
        expected = embedding_table(pilot)[batch.question_ids].bfloat16()
        assert torch.equal(batch.question[batch.question_mask], expected[batch.question_mask])
    check(copilot, made, batch)
    if "output_ids" in given:
        absent = torch.ones(VOCAB, dtype=torch.bool)
        absent[output_ids()] = False
        with torch.no_grad():
            f = copilot(batch)
            assert float(f[:, absent].abs().max()) == 0.0
            assert torch.equal(f[:, output_ids()], copilot.compact(batch))
            close(copilot.states(batch) @ copilot.output.weight.T, copilot.compact(batch), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_record_is_its_row_of_the_batch(family: str) -> None:
    """Padding of questions, states and rows changes nothing."""
    copilot, _ = make_copilot(family)
    pilot, (ids, lengths, starts) = new_pilot(family), examples()
    step = PilotStep(pilot, top_k=9)
    with torch.no_grad():
        together = copilot(batch_of(pilot, top_k=9)).split([length - start for length, start in SHAPES])
        for row, (length, _) in enumerate(SHAPES):
            one = slice(row, row + 1)
            inputs = ids[one, :length], lengths[one], starts[one]
            record = step.measure(*inputs).record
            assert record is not None
            alone = copilot(CopilotBatch.from_step(record, *inputs, positions="all"))
            # states are kept in bfloat16: float32 noise moves a rare entry to the next number, 1/256 away
            close(together[row], alone, 3e-3)


def with_padding(copilot: Copilot, batch: CopilotBatch) -> torch.Tensor:
    """`Copilot.states` with a memory that is made of all positions, padding among them."""
    count, rows, entries = batch.error_ids.shape
    errors = copilot.error_rows(batch.error_ids.view(-1, entries), batch.error_values.view(-1, entries))
    inputs = torch.cat([copilot.first_rows(count), errors.view(count, rows, -1)[:, :-1]], 1)
    at = (batch.rationale_position[:, None] == batch.row_position[:, :, None]).to(torch.uint8).argmax(-1)
    rationale = batch.rationale.float()
    producing = rationale.gather(1, at[:, :, None].expand(-1, -1, rationale.shape[2]))
    question = copilot.embed_question(batch.question_ids) if batch.question is None else batch.question.float()
    memory = torch.cat([copilot.question_memory(question), copilot.rationale_memory(rationale)], 1)
    position = batch.rationale_position[:, None]
    causal = (position <= batch.row_position[:, :, None]) & (position >= 0)
    visible = torch.cat([batch.question_mask[:, None].expand(-1, rows, -1), causal], 2)
    return copilot.decode(copilot.with_producing_state(inputs, producing), memory, visible)[batch.row_mask]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_without_its_padding_gives_the_same_update(family: str) -> None:
    """States to 1e-6, gradients to 1e-5 of the largest entry: the same products, in matrices of other sizes."""
    copilot, _ = make_copilot(family, base="narrow")
    batch = batch_of(new_pilot(family))
    found = []
    for states in (copilot.states, lambda batch: with_padding(copilot, batch)):
        copilot.zero_grad()
        out = states(batch)
        out.square().sum().backward()
        found.append((out.detach(), {n: p.grad for n, p in copilot.named_parameters() if p.requires_grad}))
    close(found[0][0], found[1][0], 1e-6)
    for name, gradient in found[0][1].items():
        assert (gradient is None) == (found[1][1][name] is None), name
        if gradient is not None and not name.endswith("k_proj.bias"):
            close(gradient, found[1][1][name], 1e-5)


# -- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_from_the_base(family: str) -> None:
    """Layer by layer; a T5's position bias stands in block 0 of the base whichever block comes first in the Copilot."""
    layers = (1, 2)
    copilot = Copilot.from_decoder(folder_of(family), layers, pilot=new_pilot(family))
    base = reference_model(family)
    if family in ENCODER_DECODER:
        own, theirs = copilot.stack.block, base.get_decoder().block
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(own[0].state_dict()[bias], theirs[0].state_dict()[bias])
        assert torch.equal(copilot.stack.final_layer_norm.weight, base.get_decoder().final_layer_norm.weight)
    else:
        own, theirs = copilot.stack.layers, base.get_decoder().layers
        assert torch.equal(copilot.stack.norm.weight, base.get_decoder().norm.weight)
    for j, index in enumerate(layers):
        weights = theirs[index].state_dict()
        for name, value in own[j].state_dict().items():
            if "relative_attention_bias" not in name:
                assert torch.equal(value, weights[name]), name
    close(copilot.error_table, embedding_table(base), 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_copilot_is_the_same(family: str, tmp_path: Path) -> None:
    copilot, _ = make_copilot(family, base="narrow", pilot="pilot-padded", output_ids=output_ids())
    copilot.save_pretrained(tmp_path)
    back = Copilot.from_pretrained(tmp_path).eval()
    said = [
        {k: v for k, v in c.config.to_dict().items() if k not in ("_name_or_path", "decoder")} for c in (copilot, back)
    ]
    assert said[0] | {"architectures": ["Copilot"], "dtype": "float32"} == said[1]
    assert [c.config.decoder["model_type"] for c in (copilot, back)] == [reference_model(family).config.model_type] * 2
    for (name, old), (new_name, new) in zip(copilot.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == new_name and old.dtype == new.dtype and torch.equal(old, new), name
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {
        n for n, p in copilot.named_parameters() if p.requires_grad
    }
    batch = batch_of(new_pilot(family, "pilot-padded"), top_k=6)
    back.save_pretrained(tmp_path / "again")
    again = Copilot.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        # weights in a mapped file stand at other addresses, for which a kernel may add in another order
        close(back(batch), copilot(batch), 2e-6)
        assert torch.equal(back(batch), again(batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(family: str, tmp_path: Path) -> None:
    """Mean error of f below 5% of its standard deviation: bfloat16 has 3 digits (1/256), and some ten roundings a layer
    add up over three layers with weights that amplify. A wrong cast, norm or mask in one dtype only is far above."""
    copilot, _ = make_copilot(family)
    copilot.save_pretrained(tmp_path)
    half = Copilot.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch = batch_of(new_pilot(family))
    with torch.no_grad():
        exact, rounded = copilot(batch), half(batch).float()
    assert float((exact - rounded).abs().mean()) < 0.05 * float(exact.std())
