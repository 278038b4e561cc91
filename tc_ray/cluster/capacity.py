"""What a run needs of a Ray cluster, whether the cluster can ever hold it, and the message of a wait.

Invariant: a run that is refused cannot be placed on the cluster's nodes even if they are empty. A cluster that can grow is
never refused. Imports nothing of the package. Called by the session, the plan, and the modules that place workers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAY_SECONDS = 30.0
"""How often a wait is reported again."""
REPORT_SECONDS = 20.0
"""Longest wait for the first report of an autoscaler, which writes one every 5 s."""
_SLACK = 1e-6
"""Ray counts resources in units of 1/10000."""

Bundle = Mapping[str, float]
"""Amounts of Ray resources by name: "CPU", "GPU" (at most 1) and custom ones."""


class CapacityError(RuntimeError):
    """The cluster cannot hold what the run asks for; the message says what is asked, what is there, what to lower."""


@dataclass(frozen=True)
class Need:
    """`count` processes of one kind that run at the same time, one bundle each. settings: config fields that lower the need."""

    who: str
    count: int
    bundle: Bundle
    settings: tuple[str, ...]

    def __str__(self) -> str:
        each = amounts(self.bundle, self.bundle)
        return f"1 {self.who} with {each}" if self.count == 1 else f"{self.count} {self.who}s with {each} each"

    def waiting(self) -> str:
        """The message of a wait: the need, and what is free now. Ray must run."""
        import ray

        return f"waiting for room: {self}; free now: {amounts(ray.available_resources(), self.bundle)}"

    def starting(self) -> str:
        """The message of a start, or of a wait if too little is free. Ray must run."""
        import ray

        return f"starting {self}" if fits([ray.available_resources()], [self]) else self.waiting()


def amounts(resources: Mapping[str, float], asked: Iterable[str] = ()) -> str:
    """CPUs, GPUs and what else is `asked` as text, for instance "4 CPUs and 1 GPU and 0.5 rack_a"."""
    custom = sorted(set(asked) - {"CPU", "GPU"})
    parts = []
    for name in ("CPU", "GPU", *custom):
        amount = resources.get(name, 0.0)
        if amount or name == "CPU":
            parts.append(f"{amount:g} {name}{'' if amount == 1 or name in custom else 's'}")
    return " and ".join(parts)


def total(needs: Iterable[Need]) -> dict[str, float]:
    """What they ask for together, by name."""
    found: dict[str, float] = {"CPU": 0.0}
    for need in needs:
        for name, amount in need.bundle.items():
            found[name] = found.get(name, 0.0) + need.count * amount
    return found


def ray_options(bundle: Bundle) -> dict[str, Any]:
    """Options of a Ray task or actor that takes the bundle."""
    custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "resources": custom}


def check_capacity(together: Sequence[Need], alone: Iterable[Need] = ()) -> None:
    """Refuse a cluster that can never hold the run. Ray must run.

    Args:
        together: needs that run at the same time, at most two. alone: needs that run when nothing else does.

    Raises CapacityError if the cluster cannot grow either.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for needs in filter(None, ([*together], *([need] for need in alone))):
        if fits(nodes, needs) or can_grow():
            continue
        asked = total(needs)
        there = ", ".join(amounts(node, asked) for node in nodes)
        short = {name: amount - sum(node.get(name, 0.0) for node in nodes) for name, amount in asked.items()}
        missing = [f"{amount:g} {name}" for name, amount in short.items() if amount > _SLACK]
        settings = list(dict.fromkeys(setting for need in needs for setting in need.settings))
        raise CapacityError(
            f"the run asks for {amounts(asked, asked)} ({'; '.join(map(str, needs))}), and this Ray cannot hold that: "
            f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} ({there}), no autoscaler. "
            + (f"Missing: {', '.join(missing)}. " if missing else "")
            + (f"Lower {', '.join(settings)}, or add nodes." if settings else "Add nodes.")
        )


def fits(nodes: Sequence[Mapping[str, float]], needs: Sequence[Need]) -> bool:
    """Whether empty nodes hold all bundles at the same time, each on one node. Exact for one or two needs."""
    first, *others = needs
    other: Bundle = others[0].bundle if others else {}
    most = _most((_beside(node, first, other) for node in nodes), first.count)
    return most[-1] >= (others[0].count if others else 0)


def _most(places: Iterable[Sequence[int]], count: int) -> list[int]:
    """[n], n <= count: most bundles of another kind that fit beside n of the first, over all places; -1: n do not fit.

    places: the same list for each place alone, as far as n fit.
    """
    most = [0] + [-1] * count
    for here in places:
        most = [
            max((most[n - k] + here[k] for k in range(min(n + 1, len(here))) if most[n - k] >= 0), default=-1)
            for n in range(count + 1)
        ]
    return most


def _beside(node: Mapping[str, float], first: Need, other: Bundle) -> list[int]:
    """[n]: most bundles of `other` that an empty node holds beside n of the first need, as far as n fit."""
    count = min(first.count, _times(node, first.bundle))
    by_sum = [
        _times({name: amount - n * first.bundle.get(name, 0.0) for name, amount in node.items()}, other)
        for n in range(count + 1)
    ]
    own, others = first.bundle.get("GPU", 0.0), other.get("GPU", 0.0)
    if not own and not others:
        return by_sum
    # a fraction is taken from one GPU: of 0.6 one fits into a GPU, and three not into two
    whole, part = divmod(node.get("GPU", 0.0), 1.0)
    places = []
    for free in (part, *[1.0] * int(whole)):
        fit = _times({"GPU": free}, {"GPU": own}) if own else 0
        places.append([_times({"GPU": free - n * own}, {"GPU": others}) for n in range(fit + 1)])
    if not own:  # those of the first need take no GPU
        places.append([0] * (count + 1))
    return [min(both) for both in zip(by_sum, _most(places, count), strict=True) if both[1] >= 0]


def _times(node: Mapping[str, float], bundle: Bundle) -> int:
    counts = [math.floor(node.get(name, 0.0) / amount + _SLACK) for name, amount in bundle.items() if amount > 0]
    return max(0, min(counts, default=2**31))


def can_grow() -> bool:
    """Whether an autoscaler can start nodes for this cluster. Ray must run.

    Ray has no public API for it, so two places are read: the report of autoscaler v1 and the node types of autoscaler v2. An unknown answer counts as yes: a wait is reported, but a refusal would be final.
    """
    try:
        from ray._private.worker import global_worker
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

        gcs = global_worker.gcs_client
        end = time.monotonic() + REPORT_SECONDS
        # of v1; in Ray's first seconds it names no node
        while report := gcs.internal_kv_get(b"__autoscaling_status", None):
            if b"autoscaler_report" in report or time.monotonic() > end:
                break
            time.sleep(0.2)
        status = GetClusterStatusReply()
        status.ParseFromString(gcs.get_cluster_status())
        types = [node.ray_node_type_name for node in status.cluster_resource_state.node_states]
        return starts_nodes(report, types if status.HasField("autoscaling_state") else [])
    except Exception:  # noqa: BLE001 - another version of Ray, or Ray Client: any error means unknown
        return True


def starts_nodes(report: bytes | None, node_types: Iterable[str]) -> bool:
    """Whether the report of autoscaler v1 (JSON; if it only watches, a node's type is "node_" and its id) or the node types of
    v2 (empty texts if it only watches) name nodes that it starts.
    """
    active = json.loads(report)["autoscaler_report"]["active_nodes"] if report else {}
    return any(not name.startswith("node_") for name in active) or any(node_types)
