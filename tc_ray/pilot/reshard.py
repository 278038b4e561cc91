"""Loads a checkpoint that another number of workers or another ZeRO stage made: each worker reads what is its part now.

Invariant: what is loaded is what the files hold, number for number: fp32 weights, AdamW's moments and its step, the learning rate's
schedule. The files name their parameters in order, and a number's place follows from that order, the stage and the number of
workers. What is frozen comes from the base model, as in any resume. Called by `checkpoint.load_checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
_INNER = {0: "optimizer_state_dict", 1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}
"""Where the state of torch's optimizer stands in that of DeepSpeed's, by ZeRO stage."""
_MASTERS = {0: "fp32_groups", 1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
_MASTERS[3] = "fp32_flat_groups"
_GAPS = "param_alignment_paddings"


class Shards:
    """The trained state in a checkpoint's files. They are mapped into memory: a number is read when it is asked for."""

    def __init__(self, folder: Path, trained: Mapping[str, Any], *, workers: int, zero_stage: int, bf16: bool) -> None:
        """trained: parameters of the model by name, in order. workers, zero_stage: of the checkpoint. bf16: type of the run."""
        rank = "zero_pp_rank_0_" if zero_stage == 3 else ""
        self.model: dict[str, Any] = _read(folder / f"{rank}mp_rank_00_model_states.pt")
        self._each_divided = zero_stage == 3
        if zero_stage == 0:
            state, module = self.model["optimizer"], self.model["module"]
            names = [name for name in trained if name in module]
            parts = [state[_MASTERS[0]][0] if bf16 else [module[name] for name in names]]
            inners, gaps = [state[_INNER[0]] if bf16 else state], [0] * len(names)
            self.sizes = {name: module[name].numel() for name in names}
        else:
            pattern = ("bf16_" if bf16 else "") + "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
            states = [_read(folder / pattern.format(rank))["optimizer_state_dict"] for rank in range(workers)]
            inners, parts = ([state[table[zero_stage]] for state in states] for table in (_INNER, _MASTERS))
            self.sizes = {n: math.prod(size) for group in self.model["param_shapes"] for n, size in group.items()}
            gaps = [gap for group in states[0].get(_GAPS, []) for gap in group] or [0] * len(self.sizes)
        self.inner: Mapping[str, Any] = inners[0]
        """State of torch's optimizer."""
        self.step: torch.Tensor | None = None
        """Steps that AdamW has taken; None: none, and there are no moments."""
        # by kind, worker and part; at stage 0 there is one worker's, and a part is a parameter
        self._parts: dict[str, list[list[torch.Tensor]]] = {WEIGHTS: parts}
        steps = [one["step"] for inner in inners for one in inner["state"].values()]
        if steps:
            self.step = max(steps)
            for moment in MOMENTS:
                self._parts[moment] = [
                    [_moment(inner, index, moment, part) for index, part in enumerate(own)]
                    for inner, own in zip(inners, parts, strict=True)
                ]
        self._places = {
            name: (at, count) for name, at, count in places(self.sizes, gaps, workers if self._each_divided else 1)
        }

    @property
    def kinds(self) -> Iterable[str]:
        """What there is of each parameter."""
        return self._parts

    def numbers(self, name: str, kind: str, first: int, last: int) -> torch.Tensor:
        """fp32 [last - first]: numbers of a parameter's weights or of one of its moments, put together from the workers' parts."""
        at, count = self._places[name]
        rows = self._parts[kind] if self._each_divided else [[part for own in self._parts[kind] for part in own]]
        found = []
        for rank, row in enumerate(rows):  # row `rank` holds numbers rank * count to (rank + 1) * count of it
            begin, end = max(first, rank * count), min(last, (rank + 1) * count)
            if begin < end:
                found.append(_cut(row, at + begin - rank * count, end - begin))
        return torch.cat(found)


def places(sizes: Mapping[str, int], gaps: Sequence[int], workers: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and length of each parameter in one worker's vector, where each parameter is divided among `workers` (ZeRO-3).

    For the other stages, workers is 1: the vector is that of all of them, which is divided as a whole. gaps: after each parameter.
    """
    at = 0
    for (name, size), gap in zip(sizes.items(), gaps, strict=True):
        count = -(-size // workers)
        yield name, at, count
        at += count + gap


def load_resharded(engine: Any, folder: Path, *, workers: int, zero_stage: int) -> None:
    """Restore model, optimizer and schedule from DeepSpeed's files of `workers` at `zero_stage` (collective).

    Raises ValueError: the files hold other trained weights than the engine.
    """
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    sizes = {name: int(getattr(p, "ds_numel", p.numel())) for name, p in trained.items()}
    bf16 = bool(engine.bfloat16_enabled())
    shards = Shards(folder, trained, workers=workers, zero_stage=zero_stage, bf16=bf16)
    if shards.sizes != sizes:
        raise ValueError(f"{folder} holds other trained weights than the configured Pilot; use a new run.folder")
    stage = engine.zero_optimization_stage()
    if stage == 3:  # as DeepSpeed does before it loads: each worker holds its part alone
        engine.optimizer.checkpoint_event_prologue()
    state = engine.optimizer.state_dict()
    _fill(state, engine.optimizer, trained, shards, sizes, stage=stage, bf16=bf16)
    if stage == 0:
        engine.optimizer.load_state_dict(state)
    else:  # DeepSpeed takes this worker's entry of the list
        states = [state] * dist.get_world_size()
        engine.optimizer.load_state_dict(states, load_optimizer_states=True, load_from_fp32_weights=True)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()
    engine.lr_scheduler.load_state_dict(shards.model["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, shards.model[name])


def _fill(
    state: dict[str, Any],
    optimizer: Any,
    trained: Mapping[str, torch.nn.Parameter],
    shards: Shards,
    sizes: Mapping[str, int],
    *,
    stage: int,
    bf16: bool,
) -> None:
    """Put this worker's part of all that `shards` hold into `state`, the optimizer's own; below ZeRO-3 also into the model."""
    workers, rank = (dist.get_world_size(), dist.get_rank()) if stage else (1, 0)
    whole = stage == 0 and not bf16  # the optimizer is torch's own
    inner = state if whole else state[_INNER[stage]]
    masters: list[torch.Tensor] = (
        list(trained.values()) if whole else state[_MASTERS[stage]][0] if stage == 0 else state[_MASTERS[stage]]
    )
    if stage in (1, 2):  # the state lacks the end of the last parts, which belongs to no parameter
        masters = list(optimizer.single_partition_of_fp32_groups)
    length = sum(master.numel() for master in masters)
    gaps = state[_GAPS][0] if stage in (1, 2) else [0] * len(sizes)
    vectors = {kind: torch.zeros(length) for kind in shards.kinds}
    for name, at, count in places(sizes, gaps, workers if stage == 3 else 1):
        # the parameter's numbers from `first` to `last` are this worker's, and stand in its vector from `to` on
        first, last = (
            (rank * count, (rank + 1) * count) if stage == 3 else (rank * length - at, rank * length - at + length)
        )
        first, last = max(0, first), min(sizes[name], last)
        to = at if stage == 3 else at + first - rank * length
        if first < last:
            for kind, vector in vectors.items():
                vector[to : to + last - first] = shards.numbers(name, kind, first, last)
        if stage < 3:
            trained[name].data.copy_(shards.numbers(name, WEIGHTS, 0, sizes[name]).view(trained[name].shape))
    divided = {kind: vector.split([master.numel() for master in masters]) for kind, vector in vectors.items()}
    if not whole:
        own = [part.view(master.shape) for part, master in zip(divided[WEIGHTS], masters, strict=True)]
        state[_MASTERS[stage]] = [own] if stage == 0 else own
    inner["state"] = {}
    if shards.step is not None:
        for index, master in enumerate(masters):
            moments = {moment: divided[moment][index].view(master.shape) for moment in MOMENTS}
            inner["state"][index] = {"step": shards.step.clone(), **moments}
    given = {name: value for name, value in shards.inner["param_groups"][0].items() if name != "params"}
    inner["param_groups"][0].update(given)


def _moment(inner: Mapping[str, Any], index: int, moment: str, part: torch.Tensor) -> torch.Tensor:
    """One moment of a part of the weights; zeros where the part never had a gradient."""
    found: torch.Tensor | None = inner["state"].get(index, {}).get(moment)
    return torch.zeros_like(part) if found is None else found


def _cut(row: Sequence[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Numbers `start` to `start` + `count` of tensors that stand one after the other."""
    found = []
    for tensor in row:
        first, last = max(0, start), min(start + count, tensor.numel())
        if first < last:
            found.append(tensor.detach().flatten()[first:last])
        start -= tensor.numel()
    return torch.cat(found)


def _read(file: Path) -> dict[str, Any]:
    # a pickle, as all files of a Pilot's checkpoint are: see "Trust" in docs/architecture.md
    loaded: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return loaded
