"""The `serving` section: how exported models are served over HTTP.

Invariant: every setting of a server is here and nowhere else; sizes are bytes, times are seconds. Read by `tc-ray serve`
and, as the `args` of a Serve config file, by `serving/deploy`; passed unchanged to every replica.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tc_ray.config.section import NonNegative, Positive, Section

MAX_BODY_BYTES = 2**24
"""Bound of `max_body_bytes`: the failover proxy keeps each body until its request has ended."""
DRAIN_MARGIN_S = 30.0
"""Default of `drain_s`, above the longest request."""
Seconds = Annotated[float, Field(gt=0)]


class ServingSection(Section):
    """`tc-ray serve`: answers over HTTP with exported models (serving.md)."""

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; one that other machines can reach needs an API key. A Serve config file sets host "
        "and port in `http_options`",
    )
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    key_file: Path | None = Field(
        None,
        description="file with the API keys that clients may send, one per line; default: the key in TC_RAY_API_KEY",
    )
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="port of the Prometheus metrics of a Ray that the server starts; null: Ray chooses",
    )
    cors_origins: list[str] = Field(
        [],
        description='origins of web pages that may call the server from a browser, such as https://app.example; "*": any',
    )
    allow_open: bool = Field(False, description="listen without a key where other machines can reach the server")
    replicas: Positive = Field(1, description="processes that each hold all models; with max_replicas, the fewest")
    max_replicas: Positive | None = Field(
        None, description="the most replicas: their number follows the requests in progress; null: always `replicas`"
    )
    threads: Positive | None = Field(
        None,
        description="torch threads per replica, and CPUs that Ray reserves for it; null: the replica's share of this machine, "
        "1 on a cluster",
    )
    gpu: bool = Field(False, description="put the models on a GPU, one GPU per replica")
    dtype: Literal["bf16", "fp32"] = Field(
        "fp32",
        description="type of the weights, the caches and of computing; bf16 takes half the bytes, and is slow on a processor "
        "without instructions for it (serving.md says what stays equal)",
    )
    failover: bool = Field(
        True, description="put the failover proxy into the Ray that the server starts: streams survive a dead replica"
    )
    max_tokens: Positive = Field(512, description="most new tokens of a choice")
    max_prompt_tokens: Positive | None = Field(
        None, description="longest prompt; null: as many tokens as the model has positions"
    )
    max_choices: Positive = Field(8, description="most choices of a request: n times its prompts")
    max_key_requests: Positive = Field(
        128, description="requests in progress per key and replica; without keys, of all clients together"
    )
    max_body_bytes: int = Field(2**20, gt=0, le=MAX_BODY_BYTES, description="longest request body")
    request_timeout_s: Seconds = Field(600.0, description="a request that takes longer fails; clients may ask for less")
    drain_s: Seconds | None = Field(
        None,
        description="time for requests in progress when a replica, or a Copilot, is replaced; null: 30 more than "
        "request_timeout_s",
    )
    max_running: Positive = Field(64, description="sequences in a model's batch, per replica")
    max_waiting: NonNegative = Field(
        64, description="sequences that wait for a place in the batch; more are answered with 429"
    )
    cache_bytes: Positive = Field(
        2**31,
        description="memory per model and replica for the keys and values of Pilot and Copilot; a sequence starts when it fits "
        "up to its last token",
    )
    prefix_bytes: NonNegative = Field(
        2**28, description="memory per model and replica for computed prompts that later prompts may begin with"
    )
    prefill_tokens: Positive = Field(
        512, description="prompt tokens computed between two steps of the batch; those behind a long text count as more"
    )

    @model_validator(mode="after")
    def _times_and_replicas(self) -> ServingSection:
        if self.drain_s is not None and self.drain_s < self.request_timeout_s:
            raise ValueError(
                f"drain_s {self.drain_s:g} is shorter than request_timeout_s {self.request_timeout_s:g}: requests would be cut "
                "when a replica is replaced"
            )
        if self.most_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than replicas {self.replicas}")
        return self

    @property
    def most_replicas(self) -> int:
        """Largest number of replicas at once."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def drain_time_s(self) -> float:
        """Time for requests in progress when a replica, or a Copilot, is replaced."""
        return self.request_timeout_s + DRAIN_MARGIN_S if self.drain_s is None else self.drain_s
