"""Are the parts that are cut from the training rows smaller than these? Pure; called by `prepare` and by plans."""

from __future__ import annotations

from collections.abc import Sequence

from tc_ray.config.data import DataSection
from tc_ray.data.encode.encode import row_count
from tc_ray.data.source.records import DataError


def cut_sizes(config: DataSection, rows: int, parts: Sequence[str]) -> dict[str, int]:
    """Rows that are cut for each of `parts` ("validation", "test"), at least one where its size is above 0."""
    sizes = {part: getattr(config, f"{part}_size") for part in parts}
    return {part: max(1, row_count(size, rows)) for part, size in sizes.items() if size}


def check_sizes(config: DataSection, rows: int, parts: Sequence[str]) -> None:
    """Raise DataError when `parts` leave none of the `rows` to train on."""
    sizes = cut_sizes(config, rows, parts)
    total = sum(sizes.values())
    if sizes and total >= rows:
        given = {part: getattr(config, f"{part}_size") for part in sizes}
        added = " + ".join(
            f"data.{part}_size {size:g}" + (f" ({sizes[part]} rows)" if size < 1 else "")
            for part, size in given.items()
        )
        relation = "more than the" if total > rows else "all of the"
        raise DataError(
            f"{added} is {total} rows, {relation} {rows} usable rows of data.train: nothing is left to train on; lower "
            "them, give more data, or name files of their own"
        )
