"""What a server is told at its start: models, limits and keys. Plain data that can be pickled into a replica.

Every number has its unit in the name. Made by `tc-ray serve` and `jobs/serve_app.py`; read by everything in serving.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """What one request, and one key, may ask for."""

    max_tokens: int = 512
    """New tokens of a choice."""
    max_prompt_tokens: int | None = None
    """None: as many as the model has positions for."""
    max_body_bytes: int = 2**20
    max_choices: int = 8
    """`n` of a request, times its prompts."""
    max_key_requests: int = 128
    """Requests of one key (or, without keys, of one server) under way at once in a replica."""
    request_timeout_s: float = 600.0
    """A request that is not done by then fails; clients may ask for less."""


@dataclass(frozen=True)
class EngineLimits:
    """What one engine holds at once."""

    max_running: int = 64
    """Sequences in the batch."""
    max_waiting: int = 64
    """Sequences that wait for a place in the batch; more are answered with 429."""
    cache_bytes: int = 2**31
    """Memory for the keys and values of Pilot and Copilot; a sequence is admitted when it fits to its last token."""
    prefix_bytes: int = 2**28
    """Memory for prompts computed lately, which later prompts may begin with; 0: none is kept."""
    prefill_tokens: int = 512
    """Most prompt tokens computed between two steps of the batch."""


@dataclass(frozen=True)
class ModelSettings:
    """One exported run: its name in the API and its export folder."""

    name: str
    export: str


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica needs to know. key_digests: SHA-256 of each key, empty: no key is asked for."""

    models: tuple[ModelSettings, ...]
    key_digests: tuple[bytes, ...] = ()
    limits: Limits = field(default_factory=Limits)
    engine: EngineLimits = field(default_factory=EngineLimits)
    threads: int | None = None
    """torch threads, and CPUs that Ray reserves for a replica; None: 1 (`tc-ray serve` on a Ray of its own shares out the
    machine's)."""
    gpu: bool = False
    watch_s: float | None = 10.0
    """How often to look for a newer Copilot in the export folders; None: never."""
    drain_s: float = 630.0
    """How long what is under way may take when a replica, or a Copilot, is replaced; longer than the longest request."""


@dataclass(frozen=True)
class Scale:
    """Replicas of a server: always as many, or between both numbers by the requests under way."""

    min_replicas: int = 1
    max_replicas: int = 1
