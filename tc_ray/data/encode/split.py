"""Cut held-out rows from training rows by the hash of their prompt.

Invariant: rows with the same prompt (case and spacing folded) stay in one part, and the cut depends on the prompts and the
seed alone, not on the order of files. Pure; called by `prepare`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from tc_ray.data.source.records import DataError


def prompt_key(prompt: str, seed: int) -> str:
    """16 hex digits: equal for equal prompts, in random order for different ones."""
    folded = " ".join(prompt.casefold().split())
    return hashlib.sha256(f"{seed}\0{folded}".encode()).hexdigest()[:16]


def row_count(size: float, rows: int) -> int:
    """Rows of a `size` setting: a fraction below 1, else a count."""
    return round(size * rows) if size < 1 else int(size)


def cut(keys: Sequence[str], validation: float, test: float) -> list[str]:
    """Part of each row: "train", "validation" or "test".

    `validation` and `test` are sizes as in the config (0: none); a size above 0 gives at least one row. All rows of a
    prompt stay together, so a part can exceed its size by the copies of one prompt.

    Raises:
        DataError: no training row is left.
    """
    copies = Counter(keys)
    part_of: dict[str, str] = {}
    order = iter(sorted(copies))
    for part, size in (("test", test), ("validation", validation)):
        wanted = max(row_count(size, len(keys)), 1) if size else 0
        taken = 0
        while taken < wanted:
            key = next(order, None)
            if key is None:
                break
            part_of[key] = part
            taken += copies[key]
    parts = [part_of.get(key, "train") for key in keys]
    if "train" not in parts:
        raise DataError(
            f"{len(keys)} rows with {len(copies)} different prompts leave nothing to train on after the cut; "
            f"lower data.validation_size ({validation:g}) and data.test_size ({test:g}), or give more data"
        )
    return parts
