"""How the rows of a round, or of a batch, are divided among ranks and forward passes.

Invariant: parts are runs of neighbouring rows, in order; each row is in one part; two parts differ by one row at most, the larger
come first. Every rank has the same number of micro-batches, as collectives need. Used by the loops of Pilot and Copilot.
"""

from __future__ import annotations


def part_of(count: int, index: int, parts: int) -> range:
    """Places of the rows of part `index` where `count` rows are cut into `parts`; empty if there are fewer rows than that."""
    size, larger = divmod(count, parts)
    start = index * size + min(index, larger)
    return range(start, start + size + (index < larger))


def micro_batches(count: int, rank: int, world_size: int, steps: int) -> list[range]:
    """Places of a rank's rows in a round of `count` rows, one range for each of its `steps` forward passes.

    The last ones are empty where the rank has fewer than `steps` rows: with micro-batches of one row, and an uneven round.
    """
    own = part_of(count, rank, world_size)
    cuts = (part_of(len(own), step, steps) for step in range(steps))
    return [own[cut.start : cut.stop] for cut in cuts]
