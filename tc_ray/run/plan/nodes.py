"""The memory of machines, and whether a run's processes fit into it: this machine, or a cluster that is described.

Invariant: what is refused cannot fit, whatever the rows are; what may not fit is a note. Where a size is not known, nothing
is compared. Called by `run.plan.plan`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tc_ray.config.schema import RunConfig
from tc_ray.run.plan.memory import GB, GPU_PROGRAM, ProcessMemory, gigabytes, pilot_worker
from tc_ray.run.plan.model_sizes import ModelSizes

_DESCRIBED = re.compile(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)(?:\+(\d+(?:\.\d+)?))?")
MOST_WORKERS = 64
"""Of the Pilot, that a proposal goes up to where the number of GPUs is not known."""


@dataclass(frozen=True)
class Node:
    """A machine. memory: bytes of RAM; None: unknown. gpu_memory: bytes of each of its GPUs; None: unknown."""

    memory: int | None
    gpus: int = 0
    gpu_memory: int | None = None


def described(text: str) -> list[Node]:
    """The nodes of "NODESxGPUSxGB+GB": "8x80" is one node with 8 GPUs of 80 GB, "2x8x80+1000" two of 1,000 GB of RAM each.

    ValueError: another form.
    """
    match = _DESCRIBED.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"--on {text}: describe nodes as NODESxGPUSxGB+GB, such as 8x80 or 2x8x80+1000")
    nodes, gpus, gpu_gb, gb = match.groups()
    memory = None if gb is None else int(float(gb) * GB)
    return [Node(memory, int(gpus), int(float(gpu_gb) * GB))] * int(nodes or 1)


def this_machine() -> Node:
    """RAM (or what a container may take of it) and GPUs of this machine."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()).isdigit():
            memory = min(memory, int(text))
    gpus = torch.cuda.device_count()
    asked = range(gpus if torch.cuda.is_available() else 0)
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in asked]
    return Node(memory, gpus, min(sizes, default=None))


def compare(
    config: RunConfig, sizes: ModelSizes, found: Sequence[ProcessMemory], nodes: Sequence[Node]
) -> tuple[list[str], list[str]]:
    """Notes and refusals, in words: processes that may not fit into the nodes, and those that cannot."""
    notes, refusals = [], []
    gpu = max((node.gpu_memory or 0 for node in nodes if node.gpus), default=0)
    ram = max((node.memory for node in nodes if node.memory), default=0)
    for process in found:
        # two processes on one GPU share its memory
        room, what = (gpu * min(1.0, process.gpus), "GPU memory") if process.gpus else (ram, "RAM")
        if not room:
            continue
        if process.kept > room and process.of_run:
            fits = _what_fits(config, sizes, nodes, room) if process.who.startswith("Pilot worker") else ""
            advice = fits or f"Change {', '.join(process.advice)}"
            refusals.append(
                f"a {process.who} needs {gigabytes(process.kept)} of {what} at least, and there are {gigabytes(room)}. {advice}"
            )
        elif process.kept + process.passing > room:
            notes.append(
                f"a {process.who} may need {gigabytes(process.kept + process.passing)} of {what} with the longest rows, and there "
                f"are {gigabytes(room)}: {', '.join(process.advice)} lower it"
            )
    beside = [process for process in found if process.together]
    if ram and all(node.memory for node in nodes):
        there = sum(node.memory or 0 for node in nodes)
        least = sum(process.count * (GPU_PROGRAM if process.gpus else process.kept) for process in beside)
        most = sum(process.count * process.host for process in beside)
        who = "; ".join(f"{process.count} {process.who}" for process in beside)
        if least > there and not refusals:
            refusals.append(
                f"training needs {gigabytes(least)} of RAM ({who}), and there are {gigabytes(there)}: fewer workers, or more nodes"
            )
        elif most > there:
            notes.append(f"training may need {gigabytes(most)} of RAM ({who}), and there are {gigabytes(there)}")
    return notes, refusals


def _what_fits(config: RunConfig, sizes: ModelSizes, nodes: Sequence[Node], room: float) -> str:
    """The least change of the Pilot's settings with which a worker fits; "" if none is found."""
    gpus = sum(node.gpus for node in nodes)
    used, pilot = config.resources.pilot_workers, config.pilot
    most = max(used, gpus) if gpus else MOST_WORKERS
    counts = range(used, min(most, pilot.batch_size) + 1)
    for workers in counts:
        for stage in range(pilot.zero_stage, 4):
            changed = config.model_copy(
                update={
                    "resources": config.resources.model_copy(update={"pilot_workers": workers}),
                    "pilot": pilot.model_copy(update={"zero_stage": stage}),
                }
            )
            needed = pilot_worker(changed, sizes).kept
            if needed <= room:
                return f"pilot.zero_stage={stage} with resources.pilot_workers={workers} needs {gigabytes(needed)} each"
    lora = "" if pilot.method == "lora" else "pilot.method=lora needs less, or "
    return f"No zero_stage with up to {most} workers fits: {lora}take a smaller model, or GPUs with more memory"
