"""Faults 5, 6 and 16 where weights are loaded: what is missing, left over, not finite or shared is refused by name at every door."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tc_ray.config.schema import RunConfig
from tc_ray.config.section import MAX_LAM
from tc_ray.export.check import ExportError, find_export
from tc_ray.export.join import fuse_models
from tc_ray.models.copilot import Copilot
from tc_ray.models.copilot.probe import check_answers
from tc_ray.models.folder import FusionSettings
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import add_adapters, check_folders, load_pilot
from tc_ray.models.weights import HEADS, NotFiniteError, WeightsError, load_whole
from tc_ray.run.plan.plan import make_plan
from tc_ray.run.state import JobError
from tests.support.tiny_families import FAMILIES, make_pilot
from tests.unit.export.test_join import exported

Tensors = dict[str, torch.Tensor]
REFUSED = (WeightsError, NotFiniteError, ExportError)


def without(weights: Tensors, name: str) -> None:
    del weights[name]


def left_over(weights: Tensors, name: str) -> None:
    weights[f"adapter.{name}"] = weights[name].clone()


def nan(weights: Tensors, name: str) -> None:
    weights[name].view(-1)[-1] = float("nan")


def infinite(weights: Tensors, name: str) -> None:
    weights[name].view(-1)[0] = -float("inf")


def other_shape(weights: Tensors, name: str) -> None:
    weights[name] = weights[name][1:].clone()


DAMAGE = [
    (without, "lacks weights of its model: {name}"),
    (left_over, "has no place for: adapter.{name}"),
    (nan, "{name} holds numbers that are not finite"),
    (infinite, "{name} holds numbers that are not finite"),
    (other_shape, "other shapes than its config.json says: {name}"),
]
PILOT, COPILOT = "layers.1.mlp.up_proj.weight", "error_projection.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("whole") / "export")


def damaged(whole: Path, folder: Path, part: str, damage: Callable[[Tensors, str], None]) -> tuple[Path, str]:
    """A copy of the export with damage in a tensor of one part, and the tensor's name."""
    shutil.copytree(whole, folder)
    file = folder / part / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(PILOT if part == "pilot" else COPILOT))
    damage(weights, name)
    save_file(weights, file, metadata={"format": "pt"})
    return folder, name


def fuse_it(pilot: Path, copilot: Path, out: Path) -> object:
    return fuse_models(str(pilot), copilot, out, lam=None, space=None, feedback=None)


DOORS: dict[str, dict[str, Callable[[Path], Any]]] = {
    "pilot": {
        "load_pilot": lambda export: load_pilot(export / "pilot", dtype=torch.bfloat16),
        "FusedModel": FusedModel.from_pretrained,
        "fuse": lambda export: fuse_it(export, export, export / "fused"),
        "a Copilot's base": lambda export: Copilot.from_decoder(
            export / "pilot", [0, 1], pilot=load_pilot(make_pilot("llama", export / "other"), dtype=torch.float32)
        ),
    },
    "copilot": {
        "Copilot": lambda export: Copilot.from_pretrained(export / "copilot", dtype=torch.bfloat16),
        "FusedModel": FusedModel.from_pretrained,
        "fuse": lambda export: fuse_it(export, export, export / "fused"),
    },
}


@pytest.mark.parametrize(("part", "door"), [(part, door) for part in DOORS for door in DOORS[part]])
@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_every_loader_refuses_by_name(
    damage: Callable[[Tensors, str], None], words: str, part: str, door: str, whole: Path, tmp_path: Path
) -> None:
    """Faults 5 and 6: a missing tensor became random weights, one left over was passed over, NaN was loaded; in one line."""
    export, name = damaged(whole, tmp_path / "export", part, damage)
    wanted = words.format(name=name.removeprefix("model.") if door == "a Copilot's base" else name)
    if door == "a Copilot's base":  # the library names a decoder's tensors without the model's prefix
        wanted = wanted.replace("adapter.", "adapter.model.")
    with pytest.raises(REFUSED) as raised:
        DOORS[part][door](export)
    assert wanted in str(raised.value) and len(str(raised.value).splitlines()) == 1
    assert not (export / "fused").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_of_every_family_are_loaded(family: str, tmp_path: Path) -> None:
    """Control: tied heads, tensors the library leaves out by itself, and the headless base of a Copilot are no damage."""
    folder = make_pilot(family, tmp_path / family)
    load_pilot(folder, dtype=torch.float32)
    load_pilot(folder, dtype=torch.bfloat16, names_only=True)
    load_whole(AutoModel, folder, leave_out=HEADS)


def config_of(pilot: Path, /, **sections: dict[str, Any]) -> RunConfig:
    run = {"run": {"folder": pilot.parent / "run"}, "data": {"template": "plain"}}
    return RunConfig.model_validate({**run, "model": {"pilot": str(pilot)}, **sections})


@pytest.mark.parametrize(("damage", "words"), [line for line in DAMAGE if line[0] not in (nan, infinite)])
def test_names_and_shapes_are_refused_before_workers_start(
    damage: Callable[[Tensors, str], None], words: str, whole: Path, tmp_path: Path
) -> None:
    """Fault 6: the job's and the plan's look, for the Pilot and for a Copilot's base of its own; no weight is read."""
    export, name = damaged(whole, tmp_path / "export", "pilot", damage)
    other = make_pilot("llama", tmp_path / "other")
    with pytest.raises(WeightsError) as raised:
        check_folders(config_of(export / "pilot"), export / "pilot", export / "pilot")
    assert words.format(name=name) in str(raised.value)
    with pytest.raises(WeightsError, match=str(export)):
        check_folders(config_of(other), other, export / "pilot")
    with pytest.raises(WeightsError, match=str(export)):
        make_plan(config_of(export / "pilot"))
    check_folders(config_of(other, log={"enabled": False}), other, export / "pilot")
    check_folders(config_of(other, model={"random_weights": True, "pilot": str(other)}), export / "pilot", other)


def test_adapters_on_a_matrix_that_is_shared_are_refused_before_workers_start(tmp_path: Path) -> None:
    """Fault 16 (`lora_tied`): only the export saw it, after the whole training. Control: a head of its own."""
    lora = {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"]}
    tied, untied = (make_pilot(family, tmp_path / family) for family in ("llama", "mistral"))
    refused = r"target_modules: model\.embed_tokens\.\S+ and lm_head\.\S+ are one matrix of this model"
    config = config_of(tied, pilot={"lora": lora})
    with pytest.raises(ValueError, match=refused):
        check_folders(config, tied, tied)
    with pytest.raises(JobError, match=refused):
        make_plan(config)
    with pytest.raises(ValueError, match=refused):  # a hub id and random weights are first loaded by a worker
        add_adapters(load_pilot(tied, dtype=torch.float32), config.pilot)
    check_folders(config_of(untied, pilot={"lora": lora}), untied, untied)
    check_folders(config_of(tied), tied, tied)
    with pytest.raises(ValueError, match=r"lora\.target_modules: Target modules .*q_prj.* not found"):
        check_folders(config_of(tied, pilot={"lora": {"target_modules": ["q_prj"]}}), tied, tied)


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    """Fault 6, its end: nothing there at all. A plan can still be made, and refuses (fault 22)."""
    folder = make_pilot("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        check_folders(config_of(folder), folder, folder)
    assert any("model.safetensors" in reason for reason in make_plan(config_of(folder)).refusals)


def test_a_copilot_that_makes_no_sense_is_refused(whole: Path) -> None:
    """Fault 5: finite but absurd weights pass every look at single numbers; a trial shows them."""
    copilot = Copilot.from_pretrained(whole / "copilot", dtype=torch.float32).eval()
    check_answers(copilot, "here")
    with torch.no_grad():
        copilot.output.weight.view(-1)[0] = 1e30
    with pytest.raises(NotFiniteError, match="here: the Copilot predicts errors of size"):
        check_answers(copilot, "here")


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), -1, 11, MAX_LAM + 1e-9, True, "0.5", None, [0.5], 10**400])
def test_a_lambda_that_is_none_is_refused_at_every_door(lam: Any, whole: Path, tmp_path: Path) -> None:
    """Fault 15: fusion.json with NaN, -1, 11 or true was served."""
    folder = tmp_path / "export"
    shutil.copytree(whole, folder)
    settings = json.loads((folder / "fusion.json").read_text())
    (folder / "fusion.json").write_text(json.dumps(settings | {"lam": lam}))
    with pytest.raises(ValueError, match=r"fusion\.json: lam is .*lambda must be"):
        FusionSettings.read(folder)
    with pytest.raises(ValueError, match="lam is"):
        FusedModel.from_pretrained(folder)
    with pytest.raises(ExportError, match=r"fusion\.json: lam is"):
        find_export(folder)
    with pytest.raises(ValueError, match="lam"):
        FusionSettings(lam, "logits", "own").write(tmp_path)
    assert not (tmp_path / "fusion.json").exists()
    if lam != "0.5":  # a config is typed by people: numbers in quotes are read
        with pytest.raises(ValueError, match="lam_grid"):
            RunConfig.model_validate({"fusion": {"lam_grid": [0.0, lam]}})
    if isinstance(lam, (int, float)) and not isinstance(lam, bool):
        with pytest.raises(ValueError, match="lam is"):
            fuse_models(str(whole), whole, tmp_path / "fused", lam=lam, space=None, feedback=None)


@pytest.mark.parametrize("lam", [0, 0.0, 0.5, 10, MAX_LAM])
def test_lambdas_of_the_range_are_read(lam: float, whole: Path, tmp_path: Path) -> None:
    """Control: integers are numbers too."""
    FusionSettings(lam, "logits", "own").write(tmp_path)
    for part in ("pilot", "copilot"):
        shutil.copytree(whole / part, tmp_path / part)
    assert FusionSettings.read(tmp_path).lam == lam


@pytest.mark.parametrize("changes", [{"space": "logit"}, {"feedback": None}])
def test_other_settings_of_the_folder_are_named(changes: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Fault 15, the rest of the file."""
    folder = tmp_path / "export"
    shutil.copytree(whole, folder)
    settings = json.loads((folder / "fusion.json").read_text())
    (folder / "fusion.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError, match=f"fusion.json: {next(iter(changes))}"):
        FusionSettings.read(folder)
