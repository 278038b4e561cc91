"""Time and memory of a call, and the parts of a Copilot's step. Used by copilot_training.py."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from fused_models import synchronise

from tc_ray.copilot.learner import Learner


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of a call, device included, and what it gave."""
    synchronise(device)
    began = time.perf_counter()
    given = run()
    synchronise(device)
    return time.perf_counter() - began, given


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Bytes that torch's allocator held at most during a call, beyond those held before it.

    What the call makes anew must be dropped before it: freeing old gradients in it would count as room.
    """
    if device != "cpu":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-") as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    # the events' own totals go on from one profile to the next
    changes = (int(e["args"]["Bytes"]) for e in sorted(events, key=lambda e: e["ts"]))
    return max(accumulate(changes))


def parts_of_step(learner: Learner, step: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of forward, backward and optimizer in a call that has the learner take one step; the rest is clipping and sums."""
    seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}

    def clocked(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            seconds[part], result = timed(partial(call, *given, **named), device)
            return result

        return run

    places: list[tuple[str, Any, str]] = [
        ("forward", learner, "forward"),
        ("backward", torch.Tensor, "backward"),
        ("optimizer", learner.optimizer, "step"),
    ]
    kept = [getattr(owner, name) for _, owner, name in places]
    for (part, owner, name), call in zip(places, kept, strict=True):
        setattr(owner, name, clocked(part, call))
    try:
        whole, _ = timed(step, device)
    finally:
        for (_, owner, name), call in zip(places, kept, strict=True):
            setattr(owner, name, call)
    return {**seconds, "rest": whole - sum(seconds.values())}
