"""A model folder may bring code or pickled weights; neither is ever run or read, also where somebody would say yes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import load_pilot
from tests.support.serving_samples import make_export

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""
NAMES = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose Pilot comes with code; the question whether to run it would be answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    export = make_export(tmp_path / "run", positions=64)
    (export / "pilot/mine.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    return export


def load_fused(export: Path) -> object:
    return FusedModel.from_pretrained(export)


def load_alone(export: Path) -> object:
    return load_pilot(export / "pilot", dtype=torch.float32)


@pytest.mark.parametrize("load", [load_fused, load_alone])
def test_code_of_a_model_is_not_run(export: Path, load: Callable[[Path], object]) -> None:
    change(export / "pilot/config.json", model_type="mine", architectures=["Mine"], auto_map=NAMES)
    with pytest.raises(ValueError, match="custom code"):
        load(export)
    assert not (export.parent / "marker").exists()


def test_an_export_has_its_weights_in_safetensors_only(tmp_path: Path) -> None:
    export = make_export(tmp_path / "run", positions=64)
    model = load_alone(export)
    torch.save(model.state_dict(), export / "pilot/pytorch_model.bin")  # type: ignore[attr-defined]
    (export / "pilot/model.safetensors").rename(export / "pilot/other.safetensors")
    with pytest.raises(OSError, match="safetensors"):
        load_fused(export)
    assert load_alone(export), "a Pilot to be trained may come in another format"
