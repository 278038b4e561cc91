"""What a growing log is kept to: how long its files should be, how many rounds and bytes it may hold."""

from __future__ import annotations

from dataclasses import dataclass

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.table.data_file import Compression


@dataclass(frozen=True)
class Upkeep:
    """Settings of the upkeep that follows a commit."""

    compact: bool
    """Merge small files."""
    file_bytes: int
    """Length that small files are merged up to."""
    keep_rounds: int | None
    max_bytes: int | None
    buffer_rounds: int
    """Rounds behind the Copilot's position that it reads again after a restart."""
    grace_seconds: float
    orphan_seconds: float
    compression: Compression = "none"
    """Of merged files."""

    @classmethod
    def from_config(cls, log: LogSection, buffer_rounds: int) -> Upkeep:
        """Of a run; buffer_rounds: see the field."""
        return cls(
            log.compact,
            log.file_bytes,
            log.keep_rounds,
            log.max_bytes,
            buffer_rounds,
            log.vacuum_grace_seconds,
            log.orphan_seconds,
            log.compression,
        )
