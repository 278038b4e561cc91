"""Writes the trained Pilot as a plain language model folder: adapters merged, ZeRO-3 shards gathered, compared with the trained one.

LoRA adapters are kept beside it, in `pilot/adapter`, as peft writes them.

Invariant: a folder is published only after a model loaded from it has given the losses of the model in training, on rows of
the run. Called by the loop after the last round.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.prompts import serving_template
from tc_ray.files import publish_folder
from tc_ray.models.folder import ADAPTER
from tc_ray.models.pilot.load import DTYPES, load_pilot, shared_adapted, whole_shape, whole_weight
from tc_ray.models.pilot.step import PilotStep
from tc_ray.models.shards import digest, write_shards
from tc_ray.models.weights import ExportMismatchError, check_finite

PROBE_ROWS = 4
"""The first rows of a run, which its export is checked with."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}
"""Difference of a row's mean loss that is allowed, as a share of that loss (of 1, if the loss is less).

bf16: a merged weight is rounded once, to 8 bits, while training adds two products: 0.105 was measured where the loss falls fastest,
0.015 later (SmolLM2-135M, LoRA of rank 16). Each merge is checked in fp32, because bf16 would hide an error of that size."""
PROBE_INPUTS, MERGED = 8, 1e-4
"""Inputs that a matrix is tried with, and how far what it gives with its adapters merged may be from what it gave (of the largest)."""
Row = Mapping[str, np.ndarray]
"""A batch of one row, see `TrainTable.batch`."""


def save_merged(
    engine: Any,
    config: RunConfig,
    model_path: Path | str,
    folder: Path,
    *,
    probe: Sequence[Row],
    rank: int,
    round_number: int = 0,
) -> None:
    """Merge in fp32, and write model (in the training dtype) and tokenizer to `folder` (collective; rank 0 writes).

    One weight is gathered, merged and written at a time. With LoRA the adapters (fp32) are written beside `folder` first: where
    that is whole, they are. round_number: whose weights they are; it stands in the folder's marker.

    Raises ExportMismatchError: the folder, loaded anew, has other losses on `probe` than the trained model.
    NotFiniteError: a merged weight is not finite.
    """
    from transformers import AutoTokenizer

    engine.eval()
    trained = _losses(engine, probe, engine.device)
    engine.train()
    temporary, adapter = folder.with_name(folder.name + ".tmp"), folder.with_name(ADAPTER + ".tmp")
    model = engine.module.model
    units = _units(model)
    if rank:
        for unit in units.values():
            _gathered(unit, keep=False)
        return
    for old in (temporary, adapter):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    digests = _write(model, units, config, model_path, temporary, adapter)
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    # served chats must be asked as the training rows were
    tokenizer.chat_template = serving_template(config.data) or tokenizer.chat_template
    tokenizer.save_pretrained(temporary)
    check_export(digests, temporary, trained, config.pilot.dtype, probe, engine.device)
    if adapter.exists():
        publish_folder(adapter, adapter.with_name(ADAPTER))
    publish_folder(temporary, folder, round=round_number)


def check_export(
    digests: Mapping[str, str],
    folder: Path,
    trained: Sequence[float],
    dtype: str,
    probe: Sequence[Row],
    device: torch.device,
) -> None:
    """Raise ExportMismatchError unless the folder, loaded anew, has the weights of `digests`, bit for bit, and the trained losses.

    On the CPU its weights are maps of its files, which the system may take back: no second copy.
    """
    written = load_pilot(folder, dtype=DTYPES[dtype], safetensors=True)
    found = dict(written.named_parameters(remove_duplicate=False))
    for name, wanted in digests.items():
        if name not in found or digest(found[name]) != wanted:
            raise ExportMismatchError(
                f"the exported Pilot was not published: {folder} has another weight {name} than was written"
            )
    del found
    _compare(trained, _losses_of(written, probe, device), TOLERANCE[dtype], f"{folder} after loading it anew")


Unit = Mapping[str, torch.nn.Parameter]
"""Parameters by name that are gathered together: of one module, or of a matrix with its adapters."""


def _units(model: Any) -> Mapping[str, Unit]:
    """Module name -> its parameters, each once, the same on every rank. Raises ExportMismatchError for a shared adapted weight."""
    from peft.tuners.lora import LoraLayer

    adapted = [f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if shared := shared_adapted(model):
        raise ExportMismatchError(
            f"the exported Pilot is not the trained one, and was not published: {shared} are one matrix, so adapters cannot be "
            "merged into one of them alone. Choose pilot.lora.target_modules without it"
        )
    units: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        owner = next((one[:-1] for one in adapted if name.startswith(one)), name.rpartition(".")[0])
        units.setdefault(owner, {})[name] = parameter
    return units


def _gathered(unit: Unit, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Whole parameters of a unit as fp32 copies on the CPU (collective under ZeRO-3; keep: on this rank)."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(unit.values()), modifier_rank=None):
        cpu = torch.device("cpu")
        return {name: whole_weight(p).to(cpu, torch.float32, copy=True) for name, p in unit.items()} if keep else {}


def _write(
    model: Any, units: Mapping[str, Unit], config: RunConfig, model_path: Path | str, folder: Path, adapter: Path
) -> dict[str, str]:
    """Write the plain model of the trained weights, in the training dtype; leaves its adapters, if any, in `adapter`.

    Returns the digests of its weights by name (collective: rank 0's part).
    """
    dtype = DTYPES[config.pilot.dtype]
    # modules without weights. From its folder: that shows whether a T5 has a head of its own, which one made from its config never has
    with torch.device("meta"):
        plain = load_pilot(model_path, dtype=dtype, random_weights=config.model.random_weights, names_only=True)
        adapters = getattr(model, "peft_config", None)
        shell = plain
        if adapters:
            from peft import get_peft_model

            shell = get_peft_model(plain, adapters["default"])
        shell.eval()
    parameters = {name: p for unit in units.values() for name, p in unit.items()}
    # which of them are shared, the trained model says: without weights it is not known
    other = parameters.keys() - {name for name, _ in shell.named_parameters(remove_duplicate=False)}
    if other:
        raise ExportMismatchError(f"the exported Pilot would have other weights than the trained one: {min(other)}")
    shapes = {_plain(n): whole_shape(p) for n, p in parameters.items() if "lora_" not in n}
    kept: dict[str, torch.Tensor] = {}

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for owner, unit in units.items():
            weights = _gathered(unit)
            if adapters:
                kept.update((name, weight.clone()) for name, weight in weights.items() if "lora_" in name)
                weights = _merge(shell.get_submodule(owner), owner, weights)
            for name in list(weights):
                written = weights.pop(name).to(dtype)
                check_finite([(name, written)], "the exported Pilot")
                yield name, written

    digests = write_shards(folder, shapes, dtype, merged())
    if adapters and not config.model.random_weights:  # then the adapters' base is nowhere but in the merged model
        # False: embeddings are never resized, and peft would ask the hub whether they were
        shell.save_pretrained(adapter, save_embedding_layers=False, state_dict=kept)
    plain.config.dtype, plain.config.architectures = str(dtype).removeprefix("torch."), [type(plain).__name__]
    plain.config.save_pretrained(folder)
    if plain.can_generate():
        plain.generation_config.save_pretrained(folder)
    return digests


def _plain(name: str) -> str:
    """A parameter's name in the plain model, from that in peft's."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _merge(module: Any, owner: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a module by their names in the plain model, its adapters merged (by peft, in fp32) and compared with.

    module: on the meta device, of peft's model; it is left so.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return {_plain(name): weight for name, weight in weights.items()}
    places = {}
    for name, weight in weights.items():
        inside, _, leaf = name.removeprefix(f"{owner}.").rpartition(".")
        holder = module.get_submodule(inside)
        places[name] = holder, leaf, getattr(holder, leaf)
        setattr(holder, leaf, torch.nn.Parameter(weight, requires_grad=False))
    base: Any = module.get_base_layer()
    draw = torch.Generator().manual_seed(0)
    if isinstance(base, torch.nn.Embedding):
        given = torch.randint(base.num_embeddings, (PROBE_INPUTS,), generator=draw)
    else:
        given = torch.randn(PROBE_INPUTS, base.in_features, generator=draw)
    with torch.no_grad():
        wanted = module(given)
        module.merge()
        found = base(given)
        scale = float(wanted.abs().max())
        # not "greater than": NaN is never close
        if not float((found - wanted).abs().max()) <= MERGED * scale:
            raise ExportMismatchError(
                f"the exported Pilot is not the trained one, and was not published: {owner} with its adapters merged gives other "
                "values. This model cannot be exported with these settings of pilot.lora"
            )
    merged = {}
    for name, (holder, leaf, before) in places.items():
        if "lora_" not in name:
            merged[_plain(name)] = getattr(holder, leaf).detach()
        setattr(holder, leaf, before)
    return merged


def _compare(trained: Sequence[float], exported: Sequence[float], tolerance: float, what: str) -> None:
    for number, (wanted, found) in enumerate(zip(trained, exported, strict=True)):
        # not "greater than": NaN is never close
        if not abs(found - wanted) <= tolerance * max(1.0, abs(wanted)):
            raise ExportMismatchError(
                f"the exported Pilot is not the trained one, and was not published: row {number} of the training data has a loss "
                f"of {wanted:.4f} nats per token in training, and {found:.4f} from {what}. This model cannot be exported with "
                "these settings of pilot.method, pilot.lora and pilot.zero_stage"
            )


def _losses_of(model: Any, probe: Sequence[Row], device: torch.device) -> list[float]:
    """Losses of a model on the CPU, computed on the trained one's device if it has memory, so that rounding is alike."""
    size = sum(p.nbytes for p in model.parameters())
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] < 2 * size:
            device = torch.device("cpu")
    step = PilotStep(model.to(device), top_k=1, record=False).eval()
    return _losses(step, probe, device)


@torch.no_grad()
def _losses(forward: Callable[..., Any], probe: Sequence[Row], device: torch.device) -> list[float]:
    """Mean loss of each row in nats per token; the forward is that of `PilotStep` (collective for an engine under ZeRO-3)."""
    losses = []
    for row in probe:
        given = [
            torch.from_numpy(row[name]).to(device, torch.int64) for name in ("input_ids", "lengths", "target_start")
        ]
        tokens = int((row["lengths"] - row["target_start"]).sum())
        losses.append(float(forward(*given, 1.0 / max(1, tokens))[0]))
    return losses
