"""The embedded data sets, for machines without any data: reasoning tasks, and item sequences of simulated users.

Reasoning tasks come from reasoning-gym. Users move through clusters of items: each item has a few successors in its cluster
and a popularity; a user mostly goes on to a successor of the last item, at times to a popular item of the cluster, rarely to
another cluster. So the next item can be learned from the last ones, but never for certain. Invariant: the same settings, seed
and reasoning-gym version give the same file, which is then read like any file of the user. Called by `prepare` and by plans.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tc_ray.config.data import EMBEDDED, TEMPLATES, DataSection, SequencesSection
from tc_ray.data.source.records import DataError

# Short enough for a 135M model to learn part of it in minutes on a CPU, hard enough to leave mistakes to learn from.
DEFAULT_OPTIONS: dict[str, dict[str, int | float | str | bool]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 2}
}
SUCCESSORS = 3
FOLLOW, STAY = 0.7, 0.25
"""Chances to go on to a successor, and to a popular item of the same cluster; otherwise the cluster changes."""
SHORTEST, MEAN_EXTRA = 5, 15


def generated_set(config: DataSection) -> str:
    """What the embedded data set is, for people and for fingerprints."""
    if config.format == "sequences":
        found = config.sequences
        sizes = f"{found.users} users over {found.items} items in {found.clusters} clusters"
        return f"embedded: generated sequences of {sizes}"
    options = ", ".join(f"{key}={value}" for key, value in sorted(_options(config).items()))
    return f"embedded: {config.embedded_task}({options}) of reasoning-gym {version('reasoning-gym')}"


def write_generated_set(config: DataSection, folder: Path, seed: int) -> Path:
    """Write the embedded data set into `folder`; returns its file."""
    path = folder / ("embedded.txt" if config.format == "sequences" else "embedded.jsonl")
    if config.format == "sequences":
        write_generated(config.sequences, path, seed)
    else:
        write_embedded(config, path, seed)
    return path


def for_fallback(config: DataSection) -> DataSection:
    """The settings with which the embedded data set replaces absent files: what is made for those is left out."""
    made_for_files = dict.fromkeys(("completion_pattern", "task", "convert", *TEMPLATES))
    return config if config.train == EMBEDDED else config.model_copy(update=made_for_files)


def _options(config: DataSection) -> dict[str, int | float | str | bool]:
    """Options of the task: the defaults of a known task, overridden by the user's."""
    return {**DEFAULT_OPTIONS.get(config.embedded_task, {}), **config.embedded_task_options}


def write_embedded(config: DataSection, path: Path, seed: int) -> None:
    """Write `config.embedded_rows` lines of JSON (prompt, completion, answer) to `path`.

    Raises DataError: the task or an option is unknown.
    """
    import reasoning_gym

    options = _options(config)
    try:
        tasks = reasoning_gym.create_dataset(config.embedded_task, size=config.embedded_rows, seed=seed, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(
            f"data.embedded_task {config.embedded_task!r} with data.embedded_task_options {options}: {error}; the tasks are "
            "listed in reasoning_gym.factory.DATASETS"
        ) from error
    with path.open("w", encoding="utf-8") as file:
        for task in tasks:
            answer = str(task["answer"])
            row = {"prompt": task["question"], "completion": f"The answer is {answer}", "answer": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_generated(config: SequencesSection, path: Path, seed: int) -> None:
    """Write one line per user to `path`: user id, then item ids in time order."""
    draw = np.random.default_rng([seed, config.items, config.clusters])
    cluster_of = draw.permutation(np.arange(config.items) % config.clusters)
    members = [np.flatnonzero(cluster_of == cluster) for cluster in range(config.clusters)]
    successors = [
        draw.choice(mates, min(SUCCESSORS, len(mates)), replace=False)
        for mates in (np.setdiff1d(members[cluster_of[item]], item) for item in range(config.items))
    ]
    with path.open("w", encoding="utf-8") as file:
        for user in range(1, config.users + 1):
            length = SHORTEST + int(draw.geometric(1 / MEAN_EXTRA))
            first = members[int(draw.integers(config.clusters))]
            taken = [int(draw.choice(first, p=_falling(len(first))))]
            while len(taken) < length:
                chance = draw.random()
                likely = successors[taken[-1]]
                if chance >= FOLLOW:
                    wanders = chance > FOLLOW + STAY
                    likely = members[int(draw.integers(config.clusters) if wanders else cluster_of[taken[-1]])]
                taken.append(int(draw.choice(likely, p=_falling(len(likely)))))
            file.write(f"{user} {' '.join(str(item) for item in taken)}\n")


def _falling(count: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, count + 1)
    return weights / weights.sum()
