"""Training of Pilots and Copilots of every family: adapters, gradient checkpointing, and gradients that reach every weight.

That gradients are the right ones is in test_families_copilot.py, against the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tc_ray.config.training import CopilotSection, LoraSection, PilotSection
from tc_ray.copilot.learner import with_adapters
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.families import family_of
from tc_ray.models.pilot.load import add_adapters
from tc_ray.models.pilot.step import PilotStep
from tests.support.family_samples import make_copilot, new_pilot, quiet
from tests.support.reference_samples import close, dense_errors
from tests.support.tiny_families import DECODER_ONLY, ENCODER_DECODER, FAMILIES, VOCAB

quiet()

SHAPES = [(14, 6), (9, 3)]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(9)
    lengths, starts = (torch.tensor(column) for column in zip(*SHAPES, strict=True))
    return torch.randint(2, VOCAB, (len(SHAPES), int(lengths.max()))), lengths, starts


def batch_of(pilot: Any) -> CopilotBatch:
    record = PilotStep(pilot, top_k=8).measure(*inputs()).record
    assert record is not None
    return CopilotBatch.from_step(record, *inputs(), positions="all")


def loss_of(copilot: Any, batch: CopilotBatch) -> torch.Tensor:
    """Equation 7, dense."""
    errors = dense_errors(batch.error_ids[batch.row_mask], batch.error_values[batch.row_mask], VOCAB)
    return ((copilot(batch) - errors) ** 2).sum(1).mean().sqrt()


@torch.no_grad()
def draw_adapters(model: torch.nn.Module) -> None:
    """LoRA begins with a zero matrix, behind which nothing has a gradient."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)


def unreached(model: torch.nn.Module) -> list[str]:
    """Trainable weights without a gradient above the noise of sums that cancel."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or float(parameter.grad.abs().max()) < 1e-6):
            found.append(name)
    return found


# -- the Pilot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_weight_of_the_pilot(family: str, method: str) -> None:
    model = add_adapters(new_pilot(family), PilotSection(method=method))  # type: ignore[arg-type]
    draw_adapters(model)
    step = PilotStep(model, top_k=5).train()
    loss, record = step(*inputs(), 1.0)
    loss.backward()
    assert record is not None
    assert not unreached(model)
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    if method == "lora":
        assert all("lora_" in name for name in adapted)
        stacks = (".encoder.", ".decoder.") if family in ENCODER_DECODER else (".layers.0.", ".layers.3.")
        assert all(any(stack in name for name in adapted) for stack in stacks)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_through_adapters_are_the_pilot_s(family: str) -> None:
    """New adapters change nothing, so the record must be that of the Pilot without them."""
    plain = PilotStep(new_pilot(family), top_k=5).measure(*inputs()).record
    model = add_adapters(new_pilot(family), PilotSection(method="lora"))
    wrapped = PilotStep(model, top_k=5).eval().measure(*inputs()).record
    assert plain is not None and wrapped is not None
    close(wrapped.rationale, plain.rationale)
    close(wrapped.errors.values, plain.errors.values)
    if plain.question is not None:
        close(wrapped.question, plain.question)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_from_a_layer_on(family: str) -> None:
    section = PilotSection(method="lora", lora=LoraSection(first_layer=2))
    if family in ENCODER_DECODER:
        with pytest.raises(ValueError, match="first_layer"):
            add_adapters(new_pilot(family), section)
        return
    model = add_adapters(new_pilot(family), section)
    layers = {name.split(".layers.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {"2", "3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_record(family: str) -> None:
    """What the backward pass computes again must not be recorded a second time."""
    made = []
    for checkpointing in (False, True):
        model = new_pilot(family)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # without dropout, which the encoder-decoders have, the two can be compared
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        step = PilotStep(model, top_k=5).train()
        loss, record = step(*inputs(), 1.0)
        loss.backward()
        _, again = step(*inputs(), 1.0)
        assert record is not None and again is not None and torch.equal(record.rationale, again.rationale)
        made.append((record, {name: p.grad for name, p in model.named_parameters()}))
    (plain, gradients), (again, others) = made
    assert torch.equal(plain.rationale, again.rationale)
    assert torch.equal(plain.errors.values, again.errors.values)
    for name, gradient in gradients.items():
        close(others[name], gradient)


# -- the Copilot --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "method"), [("narrow", "lora"), ("pilot", "full")])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_weight_of_the_copilot(family: str, base: str, method: str, tmp_path: Path) -> None:
    """In training mode (dropout of T5 and of the adapters). Frozen: the tables E, and with adapters the layers."""
    copilot, made = make_copilot(family, base=base)
    batch = batch_of(new_pilot(family))
    model = with_adapters(copilot, CopilotSection(method=method)).train()  # type: ignore[arg-type]
    draw_adapters(model)
    loss_of(model, batch).backward()
    # a key bias (Qwen2) without rotation adds the same to all scores of a row: it has no influence
    no_influence = [
        f"stack.layers.{j}.self_attn.k_proj.bias"
        for j in range(len(made.layers))
        if method == "full" and family.startswith("qwen2") and made.attends_to_memory(j)
    ]
    assert sorted(unreached(model)) == no_influence
    trainable = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if not p.requires_grad}
    assert not any("embedding" in name for name in trainable)
    assert {"output.weight", "start.weight", "error_projection.weight", "rationale_norm.weight"} <= trainable
    if method == "full":
        assert all("embedding" in name for name in frozen)
        return
    # every layer has adapters, and merged they are the same Copilot
    assert {f"{'block' if family in ENCODER_DECODER else 'layers'}.{j}" for j in range(len(made.layers))} == {
        ".".join(name.split(".")[1:3]) for name in trainable if name.startswith("stack.")
    }
    model.eval()
    with torch.no_grad():
        adapted = model(batch)
        model.merge_and_unload().save_pretrained(tmp_path)
        close(Copilot.from_pretrained(tmp_path).eval()(batch), adapted)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "t5"])
def test_a_few_steps_bring_f_near_the_errors(family: str) -> None:
    """The smallest proof that it trains: a Copilot as it is made, twenty AdamW steps on one batch."""
    pilot = new_pilot(family)
    layers = (1, 2) if family in ENCODER_DECODER else (0, 1, 3)
    copilot = Copilot.from_decoder(pilot.name_or_path, layers, pilot=pilot).train()
    batch = batch_of(pilot)
    optimizer = torch.optim.AdamW([p for p in copilot.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = loss_of(copilot, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_lora_targets_are_all_the_projections(family: str) -> None:
    """Of attention and feed-forward, none by a name that fits elsewhere."""
    model = new_pilot(family)
    linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert set(family_of(model).lora_targets) == linear
