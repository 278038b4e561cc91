"""The Pilot's export by a real DeepSpeed engine: the folder answers as the model in training does, tied head or own."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tc_ray.config.schema import RunConfig
from tc_ray.files import is_whole
from tc_ray.models.pilot import load
from tc_ray.models.pilot.load import DTYPES, load_pilot
from tc_ray.models.pilot.step import PilotStep
from tc_ray.models.shards import digest
from tc_ray.pilot.engine import build_engine
from tc_ray.pilot.export import ExportMismatchError, check_export, save_merged
from tests.support.tiny_families import ENCODER_DECODER, make_pilot

PROBE = [
    {
        "input_ids": np.array([[7, 30, 12, 90, 4, 8][: 6 - i]]),
        "lengths": np.array([6 - i]),
        "target_start": np.array([3]),
        "sample_id": np.array([i]),
    }
    for i in range(2)
]


CASES = [(family, method) for family in ("llama", "t5", "flan_t5") for method in ("full", "lora")]


def only_rank(folder: Path) -> None:
    """In a process of its own: all that needs an engine."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"  # as Ray Train sets it
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "compiled")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1)
    export_all(folder)
    tied_adapters(folder / "llama", folder / "tied")
    dist.destroy_process_group()


def export_all(folder: Path) -> None:
    """For each case an engine, weights moved as by training, export, and the engine's own logits."""
    for family, method in CASES:
        out, model = folder / f"{family}-{method}", folder / family
        config = RunConfig.model_validate(
            {
                "model": {"pilot": str(model)},
                "pilot": {"method": method, "dtype": "fp32", "batch_size": 4, "micro_batch_size": 4, "zero_stage": 1},
                "log": {"top_k": 8},
            }
        )
        engine = build_engine(config, model, rounds=2)
        with torch.no_grad():
            for parameter in engine.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        save_merged(engine, config, model, out / "final", probe=PROBE, rank=0)
        with torch.no_grad():
            torch.save(logits(engine.module.model.eval(), family), out / "logits.pt")


def logits(model: torch.nn.Module, family: str) -> torch.Tensor:
    ids = torch.tensor([[7, 30, 12, 90, 4]])
    extra = {"decoder_input_ids": torch.tensor([[0, 8, 40]])} if family in ENCODER_DECODER else {}
    made: torch.Tensor = model(input_ids=ids, use_cache=False, **extra).logits
    return made


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for family, method in CASES:
        make_pilot(family, folder / family)
        (folder / f"{family}-{method}").mkdir()
    spawned = multiprocessing.get_context("spawn").Process(target=only_rank, args=(folder,))
    spawned.start()
    spawned.join(300)
    assert spawned.exitcode == 0
    return folder


@pytest.mark.parametrize(("family", "method"), CASES)
def test_export_answers_as_the_trained_model(family: str, method: str, exports: Path) -> None:
    """Merging LoRA adds the same products in another order (1e-5 of the largest logit)."""
    folder, model = exports / f"{family}-{method}", exports / family
    wanted = torch.load(folder / "logits.pt")
    with torch.no_grad():
        found = logits(load_pilot(folder / "final", dtype=torch.float32).eval(), family)
        before = logits(load_pilot(model, dtype=torch.float32).eval(), family)
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= 1e-5 * scale
    assert float((before - wanted).abs().max()) > 0.1 * scale, "training changed nothing: the comparison proves nothing"


@pytest.mark.parametrize("family", ["llama", "t5", "flan_t5"])
def test_adapters_are_kept_beside_the_merged_model(family: str, exports: Path) -> None:
    """peft alone loads them on the base, and has the logits of training."""
    from peft import PeftModel

    folder = exports / f"{family}-lora"
    base = load_pilot(exports / family, dtype=torch.float32)
    with torch.no_grad():
        found = logits(PeftModel.from_pretrained(base, folder / "adapter").eval(), family)
    wanted = torch.load(folder / "logits.pt")
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert is_whole(folder / "adapter") and not (exports / f"{family}-full" / "adapter").exists()


def tied_adapters(model: Path, out: Path) -> None:
    """What no run can get to: adapters on a shared matrix are refused before it. It stands for any wrong merge."""
    load.shared_adapted = lambda model: ""
    lora = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "dropout": 0.0}
    pilot = {"dtype": "bf16", "batch_size": 4, "micro_batch_size": 4, "lora": lora}
    config = RunConfig.model_validate({"model": {"pilot": str(model)}, "pilot": pilot, "log": {"top_k": 8}})
    engine = build_engine(config, model, rounds=2)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    (out / "final").mkdir(parents=True)
    (out / "final" / "earlier").write_text("stays")
    try:
        save_merged(engine, config, model, out / "final", probe=PROBE, rank=0)
    except ExportMismatchError as error:
        (out / "error").write_text(str(error))


def test_nothing_is_compiled(exports: Path) -> None:
    assert (exports / "tied" / "error").exists()
    assert not (exports / "compiled").exists(), (
        "DeepSpeed has compiled an operator: minutes, and a compiler on each node"
    )


def test_an_export_that_is_not_the_trained_pilot_is_not_published(exports: Path) -> None:
    """Fault 16: the case that was found (adapters on a tied embedding), in bf16."""
    said = (exports / "tied" / "error").read_text()
    assert "the exported Pilot is not the trained one, and was not published" in said and len(said.splitlines()) == 1
    assert [path.name for path in (exports / "tied" / "final").iterdir()] == ["earlier"]


def digests(model: torch.nn.Module) -> dict[str, str]:
    return {name: digest(weight) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_folder_is_what_is_compared(dtype: str, tmp_path: Path) -> None:
    """Fault 16: also what changes between writing and reading: each weight bit for bit, and the losses of training."""
    folder, cpu = make_pilot("llama", tmp_path / "model"), torch.device("cpu")
    model = load_pilot(folder, dtype=DTYPES[dtype])
    step = PilotStep(model, top_k=1, record=False).eval()
    with torch.no_grad():
        own = [
            float(step(*(torch.from_numpy(row[n]) for n in ("input_ids", "lengths", "target_start")), 1 / (3 - i))[0])
            for i, row in enumerate(PROBE)
        ]
    check_export(digests(model), folder, own, dtype, PROBE, cpu)
    for other in ([own[0], own[1] * 1.3 + 1], [float("nan")] * 2):
        with pytest.raises(ExportMismatchError, match=r"row \d of the training data has a loss of .* loading it anew"):
            check_export(digests(model), folder, other, dtype, PROBE, cpu)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1.0
    with pytest.raises(ExportMismatchError, match=r"another weight model\.layers\.1\.mlp\.down_proj\.weight than"):
        check_export(digests(model), folder, own, dtype, PROBE, cpu)
