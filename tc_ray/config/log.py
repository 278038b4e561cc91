"""The `log` section: what the Mistake Log keeps of each token, where it is kept, and for how long."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tc_ray.config.section import MayChange, NonNegative, Positive, Section


class LogSection(Section):
    """The Mistake Log."""

    enabled: bool = Field(True, description="false: plain fine-tuning, no log and no Copilot (benchmarks)")
    path: str | None = Field(
        None, description="folder, or s3://, gs:// or az:// location, of the log; null: log/ in the run folder"
    )
    storage_options: MayChange[dict[str, str]] = Field(
        default_factory=dict,
        description="options of an object store as delta-rs names them (aws_endpoint_url, ...); missing ones come "
        "from the environment. Only values that are known to be harmless (region, endpoint, ...) are saved with the run; "
        "the others are struck out, and a resume must be given them again",
    )
    rationale: Literal["pooled", "all"] | list[NonNegative] = Field(
        "pooled",
        description="hidden states kept per position: one, pooled over all decoder layers; those of all layers; or those of "
        "the layers listed, from 0. The Copilot reads their pooled value in each case",
    )
    pooling: Literal["mean", "max", "sum"] = Field(
        "mean", description="how the hidden states of a token are pooled over the layers (table 19)"
    )
    states: Literal["bf16", "int8"] = Field(
        "bf16",
        description="how a stored hidden state is kept: its numbers in 16 bits each, or in 8 bits with one scale per state, "
        "an error of at most 1/254 of the state's largest number; the Copilot reads bf16 in each case",
    )
    positions: Literal["all", "target"] = Field(
        "all",
        description="positions whose hidden states are kept: every one, or only those that predict a target token "
        "(the only ones of an encoder-decoder)",
    )
    question: Literal["ids", "states"] = Field(
        "ids",
        description="X~ of a decoder-only Pilot: made of the prompt's ids with the embedding that the Pilot started from, or kept "
        "as the round's embedding gives it (paper; it is another one with pilot.method full alone). An encoder's output is always kept",
    )
    error: Literal["top-k", "dense"] = Field(
        "top-k", description="errors kept per target token: the largest ones and the mass of the rest, or all V of them"
    )
    top_k: Positive = Field(
        16,
        description="largest predicted probabilities kept per target token, besides the true token; 8 bytes each. "
        "Measured quality was the same from 1 to 64",
    )
    sampling: Literal["all", "fraction", "mistakes"] = Field(
        "all",
        description="records kept: every one; sampling_fraction of them, chosen by seed, round and sample; or those with a "
        "mistake: a target token not ranked first or with a loss above mistake_loss",
    )
    sampling_fraction: float = Field(1.0, gt=0, le=1, description="share of the records that sampling: fraction keeps")
    mistake_loss: float | None = Field(
        None,
        gt=0,
        description="nats; with sampling: mistakes, a token with a larger loss is a mistake too; null: none is",
    )
    flush_rounds: MayChange[Positive] = Field(
        4, description="a data file is cut at least every this many rounds, so that the Copilot sees fresh records"
    )
    file_bytes: MayChange[Positive] = Field(
        128 * 2**20, description="a data file is cut when it reaches this size, and small files are merged up to it"
    )
    queue_rounds: MayChange[Positive] = Field(8, description="micro-batches that may wait for the writer thread")
    full_policy: MayChange[Literal["block", "drop"]] = Field(
        "block",
        description="when the writer's queue is full, because the log's disk is full or too slow: block: the Pilot waits; "
        "drop: the micro-batch is dropped. Both are counted and end by themselves when there is space again",
    )
    compression: MayChange[Literal["none", "zstd"]] = Field(
        "none", description="of the data files; zstd saves about a fifth of the bytes at half the writing speed"
    )
    compact: MayChange[bool] = Field(True, description="merge small files of the log while the run trains")
    keep_rounds: MayChange[Positive | None] = Field(None, description="newest rounds kept in the log; null: all")
    max_bytes: MayChange[Positive | None] = Field(
        None,
        description="bytes the log may take, null: no limit; the oldest rounds are removed first, but none that the Copilot "
        "has not read yet",
    )
    vacuum_grace_seconds: MayChange[float] = Field(
        600, gt=0, description="files that left the log stay this long for readers without a lease (DuckDB, Spark)"
    )
    orphan_seconds: MayChange[float] = Field(
        3600, gt=0, description="files that were never committed are removed after this long"
    )
