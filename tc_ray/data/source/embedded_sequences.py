"""The generated sequence set: users who move through clusters of items, for machines without any data.

Each item has a few successors in its own cluster and a popularity; a user mostly goes on to a successor of the last
item, at times to a popular item of the cluster, rarely to another cluster. So the next item can be learned from the last
ones, but never for certain. Invariant: the same settings and seed give the same file. Called by `prepare` and `estimate`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tc_ray.config.data import SequencesSection

SUCCESSORS = 3
FOLLOW, STAY = 0.7, 0.25
"""Chances to go on to a successor, and to a popular item of the same cluster; otherwise the cluster changes."""
SHORTEST, MEAN_EXTRA = 5, 15


def generated_name(config: SequencesSection) -> str:
    """What the generated set is, for people and for fingerprints."""
    return (
        f"embedded: generated sequences of {config.users} users over {config.items} items in {config.clusters} clusters"
    )


def write_generated(config: SequencesSection, path: Path, seed: int) -> None:
    """Write one line a user to `path`: user id, then item ids in time order."""
    draw = np.random.default_rng([seed, config.items, config.clusters])
    cluster_of = draw.permutation(np.arange(config.items) % config.clusters)
    members = [np.flatnonzero(cluster_of == cluster) for cluster in range(config.clusters)]
    popularity = [_falling(len(items)) for items in members]
    successors = [
        draw.choice(mates, min(SUCCESSORS, len(mates)), replace=False)
        for mates in (np.setdiff1d(members[cluster_of[item]], item) for item in range(config.items))
    ]
    with path.open("w", encoding="utf-8") as file:
        for user in range(1, config.users + 1):
            length = SHORTEST + int(draw.geometric(1 / MEAN_EXTRA))
            cluster = int(draw.integers(config.clusters))
            taken = [int(draw.choice(members[cluster], p=popularity[cluster]))]
            while len(taken) < length:
                chance = draw.random()
                if chance < FOLLOW:
                    likely = successors[taken[-1]]
                    taken.append(int(draw.choice(likely, p=_falling(len(likely)))))
                    continue
                wanders = chance > FOLLOW + STAY
                cluster = int(draw.integers(config.clusters) if wanders else cluster_of[taken[-1]])
                taken.append(int(draw.choice(members[cluster], p=popularity[cluster])))
            file.write(f"{user} {' '.join(str(item) for item in taken)}\n")


def _falling(count: int) -> np.ndarray:
    """Probabilities proportional to 1, 1/2, 1/3, ..."""
    weights = 1.0 / np.arange(1, count + 1)
    return weights / weights.sum()
