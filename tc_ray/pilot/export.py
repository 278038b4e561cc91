"""Writes the trained Pilot as a plain language model folder: adapters merged, ZeRO-3 shards gathered, compared with the trained one.

LoRA adapters are kept beside it, in `pilot/adapter`, as peft writes them.

Invariant: a folder is published only after a model loaded from it has given the losses of the model in training, on rows of
the run. Called by the loop after the last round.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.prompts import serving_template
from tc_ray.files import publish_folder
from tc_ray.models.folder import ADAPTER
from tc_ray.models.pilot.load import DTYPES, load_pilot, whole_weight
from tc_ray.models.pilot.step import PilotStep
from tc_ray.models.weights import ExportMismatchError, check_finite

PROBE_ROWS = 4
"""The first rows of a run, which its export is checked with."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}
"""Difference of a row's mean loss that is allowed, as a share of that loss (of 1, if the loss is less).

bf16: a merged weight is rounded once, to 8 bits, while training adds two products: 0.105 was measured where the loss falls fastest,
0.015 later (SmolLM2-135M, LoRA of rank 16). The merge is checked in fp32, because bf16 would hide an error of that size."""
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
    """Merge on a copy in fp32, and write model (in the training dtype) and tokenizer to `folder` (collective; rank 0 writes).

    With LoRA the adapters (fp32) are written beside `folder` first: where that is whole, they are.
    round_number: whose weights they are; it stands in the folder's marker.

    Raises ExportMismatchError: the folder, loaded anew, has other losses on `probe` than the trained model.
    NotFiniteError: a merged weight is not finite.
    """
    import deepspeed
    from transformers import AutoTokenizer

    engine.eval()
    trained = _losses(engine, probe, engine.device)
    model = engine.module.model
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            if rank == 0:
                state[name] = whole_weight(parameter).float().cpu().clone()
    engine.train()
    if rank:
        return
    temporary, adapter = folder.with_name(folder.name + ".tmp"), folder.with_name(ADAPTER + ".tmp")
    for old in (temporary, adapter):
        shutil.rmtree(old, ignore_errors=True)
    merged = _merged(model, state, config, model_path, probe, adapter)
    del state
    merged.save_pretrained(temporary)
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    # served chats must be asked as the training rows were
    tokenizer.chat_template = serving_template(config.data) or tokenizer.chat_template
    tokenizer.save_pretrained(temporary)
    check_export(merged, temporary, trained, config.pilot.dtype, probe, engine.device)
    if adapter.exists():
        publish_folder(adapter, adapter.with_name(ADAPTER))
    publish_folder(temporary, folder, round=round_number)


def check_export(
    merged: Any, folder: Path, trained: Sequence[float], dtype: str, probe: Sequence[Row], device: torch.device
) -> None:
    """Raise ExportMismatchError unless the folder, loaded anew, has the merged weights, bit for bit, and the trained losses."""
    written = load_pilot(folder, dtype=DTYPES[dtype], safetensors=True)
    found = dict(written.named_parameters(remove_duplicate=False))
    for name, wanted in merged.named_parameters(remove_duplicate=False):
        if name not in found or not torch.equal(found[name], wanted):
            raise ExportMismatchError(
                f"the exported Pilot was not published: {folder} has another weight {name} than was written"
            )
    del found
    _compare(trained, _losses_of(written, probe, device), TOLERANCE[dtype], f"{folder} after loading it anew")


def _merged(
    model: Any,
    state: dict[str, torch.Tensor],
    config: RunConfig,
    model_path: Path | str,
    probe: Sequence[Row],
    adapter: Path,
) -> Any:
    """The plain model of the trained weights, in the training dtype, on the CPU. Leaves its adapters, if any, in `adapter`."""
    # with its weights: they show whether a T5 has a head of its own, which one made from its config never has
    merged = load_pilot(model_path, dtype=torch.float32, random_weights=config.model.random_weights)
    adapters = getattr(model, "peft_config", None)
    if adapters:
        from peft import get_peft_model

        merged = get_peft_model(merged, adapters["default"])
    other = {name for name, _ in merged.named_parameters()} ^ state.keys()
    if other:
        raise ExportMismatchError(f"the exported Pilot would have other weights than the trained one: {min(other)}")
    merged.load_state_dict(state, strict=False)
    if adapters:
        cpu = torch.device("cpu")
        adapted = _losses_of(merged, probe, cpu)
        if not config.model.random_weights:  # then the adapters' base is nowhere but in the merged model
            # False: embeddings are never resized, and peft would ask the hub whether they were
            merged.save_pretrained(adapter, save_embedding_layers=False)
        merged = merged.merge_and_unload()
        _compare(adapted, _losses_of(merged, probe, cpu), TOLERANCE["fp32"], "the model with its adapters merged")
    merged = merged.to(DTYPES[config.pilot.dtype])
    check_finite(itertools.chain(merged.named_parameters(), merged.named_buffers()), "the exported Pilot")
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
