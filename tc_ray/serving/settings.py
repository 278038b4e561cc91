"""What a replica is started with. Plain data that is pickled into it.

Made by deploy/settings.py; read by http/ and models/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tc_ray.config.serving import ServingSection


@dataclass(frozen=True)
class ReplicaSettings:
    """models: name in the API -> export folder. key_digests: SHA-256 of each API key; empty: no key is needed."""

    models: Mapping[str, Path]
    serving: ServingSection = field(default_factory=ServingSection)
    key_digests: tuple[bytes, ...] = ()
