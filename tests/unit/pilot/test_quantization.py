"""QLoRA: adapters over frozen weights in 4 bits. Skipped where bitsandbytes is not installed; refusals are not.

bitsandbytes computes NF4 on processors too, so nothing here stands for anything else.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.training import PilotSection
from tc_ray.export.pilot import export_pilot
from tc_ray.models.pilot import load
from tc_ray.models.pilot.load import DTYPES, add_adapters, check_quantization, load_pilot, whole_weight
from tc_ray.models.pilot.step import PilotStep
from tc_ray.models.weights import ExportMismatchError
from tc_ray.pilot.loop import PilotJob, Worker
from tests.support.family_samples import folder_of, quiet
from tests.support.reference_samples import close
from tests.support.tiny_families import FAMILIES, VOCAB
from tests.support.tiny_run import tiny_config
from tests.unit.pilot.test_validation import write_rows

quiet()

installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
NF4 = PilotSection.model_validate({"quantization": "nf4", "lora": {"rank": 4, "dropout": 0.0}})
ROUNDS = 4


class Killed(Exception):
    pass


class Points:
    """Stands for the Tracker's actor. die_at: the round whose report kills the worker."""

    def __init__(self, die_at: int | None) -> None:
        self.losses: dict[int, float] = {}
        self._die_at = die_at
        self.pilot = SimpleNamespace(remote=self._pilot)
        quiet = SimpleNamespace(remote=lambda *_: None)
        self.process = self.event = self.waiting = self.spent = self.memory = quiet

    def _pilot(self, number: int, metrics: dict[str, Any]) -> None:
        if number == self._die_at:
            raise Killed
        self.losses[number] = metrics["loss"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"pilot": {"quantization": "nf4", "method": "full"}}, "set method to lora"),
        ({"pilot": {"quantization": "nf4", "zero_stage": 3}}, "set zero_stage to 2, 1 or 0"),
        ({"pilot": {"quantization": "nf4"}, "model": {"random_weights": True}}, "leave model.random_weights out"),
    ],
)
def test_what_cannot_be_quantized_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate(sections)


def test_without_the_package_it_is_refused_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    check_quantization(RunConfig())
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes, on every node: pip install tc-ray\[qlora\]"):
        check_quantization(RunConfig.model_validate({"pilot": {"quantization": "nf4"}}))


@installed
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_of_its_whole_weights(family: str) -> None:
    """Loss, record and gradients of the adapters are those of a model in fp32 that has the rounded weights."""
    torch.manual_seed(9)
    lengths, starts = torch.tensor([14, 9]), torch.tensor([6, 3])
    ids = torch.randint(2, VOCAB, (2, 14))
    quantized = add_adapters(load_pilot(folder_of(family), dtype=torch.float32, nf4=True), NF4)
    with torch.no_grad():
        for name, parameter in quantized.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    state = {name: whole_weight(parameter).clone() for name, parameter in quantized.named_parameters()}
    whole = add_adapters(load_pilot(folder_of(family), dtype=torch.float32), NF4)
    rounded = [name for name, weight in whole.named_parameters() if not torch.equal(state[name], weight)]
    assert any("base_layer" in name for name in rounded) and not any("embed" in name for name in rounded)
    whole.load_state_dict(state, strict=False)
    found = []
    for model in (quantized, whole):
        step = PilotStep(model, top_k=VOCAB - 1)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss, record = step(ids, lengths, starts, 1.0)
        loss.backward()
        assert record is not None
        found.append((loss.detach(), record, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, record, gradients), (wanted, other, others) = found
    close(loss, wanted)
    close(record.rationale, other.rationale)
    close(record.token_loss, other.token_loss)
    assert gradients.keys() == others.keys() and all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-4)


@installed
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "bf16")])
def test_a_killed_run_goes_on_and_exports_what_it_trained_on(
    stage: int, dtype: str, group: None, tmp_path: Path
) -> None:
    """`save_merged` itself compares the folder with the model in training; here the frozen part is looked at."""
    data = write_rows(tmp_path / "train.parquet", [(f"{n}+1=", str(n + 1)) for n in range(16)])
    pilot = {"method": "lora", "quantization": "nf4", "zero_stage": stage, "dtype": dtype, "learning_rate": 1e-2}
    sizes = {"batch_size": 4, "micro_batch_size": 2, "checkpoint_every_rounds": 2}
    given = {f"pilot__{name}": value for name, value in (pilot | sizes | {"lora": {"rank": 4}}).items()}
    losses: list[dict[int, float]] = []
    for name, deaths in (("killed", (4, None)), ("whole", (None,))):
        config = tiny_config(tmp_path, log__enabled=False, run__folder=tmp_path / name, run__name="q", **given)
        losses.append({})
        for die_at in deaths:
            points = Points(die_at)
            try:
                Worker(PilotJob(config, config.model.pilot, data, ROUNDS, None, points), 0, 1).run()
            except Killed:
                assert die_at is not None
            losses[-1] |= points.losses
    assert losses[0] == losses[1] and losses[0].keys() == {1, 2, 3, 4}
    final = load_file(tmp_path / "killed" / "pilot" / "final" / "model.safetensors")
    base = load_pilot(config.model.pilot, dtype=DTYPES[dtype], nf4=True)
    adapters = load_file(tmp_path / "killed" / "pilot" / "adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "killed" / "pilot" / "adapter" / "adapter_config.json").read_text())
    place = "model.layers.0.self_attn.q_proj"
    a, b = (adapters[f"base_model.model.{place}.lora_{side}.weight"] for side in "AB")
    wanted = whole_weight(dict(base.named_parameters())[f"{place}.weight"]).float() + settings["lora_alpha"] / 4 * b @ a
    assert float(b.abs().max()) > 0
    torch.testing.assert_close(final[f"{place}.weight"].float(), wanted, rtol=1e-2, atol=1e-3)
    # the adapters are checked on the base as it was trained on; on the base in full they are another model
    save_config(config, tmp_path / "whole" / "config.yaml")
    assert (export_pilot(tmp_path / "whole", "adapter", None) / "adapter_model.safetensors").is_file()
    save_config(
        config.model_copy(update={"pilot": config.pilot.model_copy(update={"quantization": None})}),
        tmp_path / "whole" / "config.yaml",
    )
    with pytest.raises(ExportMismatchError, match="the base with these adapters"):
        export_pilot(tmp_path / "whole", "adapter", tmp_path / "other")
