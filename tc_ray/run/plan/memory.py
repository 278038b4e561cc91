"""Peak memory of every process of a run, predicted from the sizes of its models.

Invariant: `kept` is what a process cannot do without, whatever the rows are (weights, gradients, optimizer, the programs
themselves); `passing` is what long rows need besides. A run is refused for the first alone. The formulas follow what
DeepSpeed 0.19, torch's AdamW and this package allocate; `jobs/benchmarks/memory.py` compares. Called by `run.plan.plan`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tc_ray.cluster.session import copilot_need, evaluation_need, pilot_need
from tc_ray.config.schema import RunConfig
from tc_ray.run.plan.model_sizes import ModelSizes

GB = 10**9
PROGRAM = int(0.7 * GB)
"""Python with torch, transformers, DeepSpeed and Ray in a process without a GPU."""
GPU_PROGRAM = 3 * GB
"""The same with CUDA's libraries."""
CONTEXT = int(0.8 * GB)
"""Of a GPU: CUDA's own, kernels, cuBLAS and nccl."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's bucket of gradients (`reduce_bucket_size`), all allocated on a GPU."""
LIVE = 1_000_000_000
"""Gathered weights that ZeRO-3 holds at most (`stage3_max_live_parameters`)."""
EVALUATED = 512
"""Target tokens whose log-probabilities an evaluation holds at once."""
_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class ProcessMemory:
    """`count` processes of one kind. gpus: that each takes. kept, passing: bytes where it computes, GPU or RAM. host: bytes of RAM.

    together: it runs beside the others that say so. advice: settings that lower it. of_run: False: what serves the run later.
    """

    who: str
    count: int
    gpus: float
    kept: int
    passing: int
    host: int
    together: bool
    advice: tuple[str, ...]
    of_run: bool = True

    def __str__(self) -> str:
        most = gigabytes(self.kept + self.passing)
        of = f"{most} of a GPU ({gigabytes(self.passing)} of it for the longest rows), {gigabytes(self.host)} of RAM"
        return f"{self.count} {self.who}{'s' if self.count > 1 else ''}: {of if self.gpus else f'{most} of RAM'} each"


def gigabytes(count: float) -> str:
    """Bytes as GB with one digit."""
    return f"{count / GB:.1f} GB"


def processes(config: RunConfig, sizes: ModelSizes, *, round_bytes: int, rounds: int | None) -> list[ProcessMemory]:
    """All processes of a run, and a replica of its server. round_bytes: of a round in the log, 0 without one or if unknown.

    rounds: of the run; None: unknown. Those of a Copilot whose size is unknown are left out.
    """
    found = [pilot_worker(config, sizes, round_bytes=round_bytes), rank_0_at_export(config, sizes, round_bytes)]
    if config.log.enabled and sizes.copilot is not None and sizes.copilot_trainable is not None:
        found.append(learner(config, sizes, round_bytes=round_bytes, rounds=rounds))
        found += [evaluation_worker(config, sizes), replica(config, sizes)]
    return found


def pilot_worker(config: RunConfig, sizes: ModelSizes, *, round_bytes: int = 0) -> ProcessMemory:
    """A Pilot worker in training."""
    need, pilot = pilot_need(config), config.pilot
    gpus, number = need.bundle.get("GPU", 0.0), _BYTES[pilot.dtype]
    kept = pilot_states(
        sizes.pilot, sizes.pilot_trainable, number, stage=pilot.zero_stage, workers=need.count, gpu=bool(gpus)
    )
    passing = _activations(config, sizes)
    queue = config.log.queue_rounds * round_bytes * pilot.micro_batch_size // pilot.batch_size
    # weights of another type than the files' are cast on the CPU first; ZeRO-3 does so one at a time
    load = _table(sizes) * number if pilot.zero_stage == 3 else number * sizes.pilot
    advice = ("pilot.zero_stage", "resources.pilot_workers", "pilot.micro_batch_size", "pilot.gradient_checkpointing")
    return _process("Pilot worker", need.count, gpus, kept, passing, load, queue, advice, together=True)


def rank_0_at_export(config: RunConfig, sizes: ModelSizes, round_bytes: int) -> ProcessMemory:
    """Rank 0 of the Pilot, when it writes the trained model: its engine, and the largest matrix in fp32 and in the type written."""
    worker = pilot_worker(config, sizes, round_bytes=round_bytes)
    matrix = _table(sizes) * (4 + _BYTES[config.pilot.dtype])
    extra = 0 if worker.gpus else matrix
    # on a GPU the written model is tried where it was trained only if there is room for it
    return ProcessMemory(
        "Pilot worker at its export",
        1,
        worker.gpus,
        worker.kept + extra,
        0,
        worker.host + matrix,
        False,
        worker.advice,
    )


def learner(config: RunConfig, sizes: ModelSizes, *, round_bytes: int, rounds: int | None) -> ProcessMemory:
    """A Copilot learner: fp32 weights, gradients and AdamW, and the records of its last rounds in RAM."""
    need, copilot = copilot_need(config), config.copilot
    assert need is not None and sizes.copilot is not None and sizes.copilot_trainable is not None
    gpus = need.bundle.get("GPU", 0.0)
    kept = 4 * sizes.copilot + 12 * sizes.copilot_trainable
    width, layers = sizes.copilot_hidden_size or 0, sizes.copilot_layers or 0
    records = max(1, copilot.batch_size // need.count)
    tokens = records * config.data.cutoff_tokens
    passing = tokens * _BYTES[copilot.dtype] * (layers * 14 * width + 8 * sizes.hidden_size)
    held = min(copilot.buffer_rounds, rounds or copilot.buffer_rounds) * round_bytes
    # while it loads: the Pilot's embedding in fp32, and the layers as the files have them
    load = 4 * sizes.copilot + 4 * _table(sizes)
    advice = ("copilot.every", "copilot.method", "copilot.buffer_rounds", "resources.copilot_workers")
    return _process("Copilot learner", need.count, gpus, kept, passing, load, held, advice, together=True)


def evaluation_worker(config: RunConfig, sizes: ModelSizes) -> ProcessMemory:
    """An evaluation worker: Pilot and Copilot in the Pilot's type, keys and values of its beams, log-probabilities."""
    assert sizes.copilot is not None
    need, number = evaluation_need(config), _BYTES[config.pilot.dtype]
    kept = number * (sizes.pilot + sizes.copilot)
    fusion = config.fusion
    tokens = fusion.eval_batch_size * fusion.num_beams * (config.data.cutoff_tokens + fusion.max_new_tokens)
    cache = 2 * number * tokens * sizes.layers * (sizes.kv_size or sizes.hidden_size)
    scores = 4 * 4 * sizes.vocab_size * max(EVALUATED, fusion.eval_batch_size * fusion.num_beams)
    advice = ("fusion.eval_batch_size", "fusion.num_beams")
    gpus = need.bundle.get("GPU", 0.0)
    return _process("evaluation worker", 1, gpus, kept, cache + scores, kept, 0, advice, together=False)


def replica(config: RunConfig, sizes: ModelSizes) -> ProcessMemory:
    """A replica of `tc-ray serve` with this run's models: weights, and the stores of keys and values that its settings bound."""
    assert sizes.copilot is not None
    serving = config.serving
    kept = _BYTES[serving.dtype] * (sizes.pilot + sizes.copilot)
    cache = serving.cache_bytes + serving.prefix_bytes
    advice = ("serving.dtype", "serving.cache_bytes", "serving.prefix_bytes")
    made = _process("replica of the server", 1, float(serving.gpu), kept, cache, kept, 0, advice, together=False)
    return replace(made, of_run=False)


def pilot_states(parameters: int, trained: int, number: int, *, stage: int, workers: int, gpu: bool) -> int:
    """Bytes of weights, gradients and optimizer of a worker. number: bytes of a number in training."""
    share = -(-trained // workers) if stage else trained
    weights = number * parameters
    if stage == 3:
        weights = -(-weights // workers) + number * min(parameters, LIVE)
    gradients = number * (share if stage >= 2 else trained)
    adam = 8 * share
    if stage == 0 and number == 4:
        return weights + gradients + adam
    # a master copy in fp32, and the gradients of a step in fp32
    states = adam + 8 * share
    bucket = number * (BUCKET if gpu else min(BUCKET, trained)) if stage else 0
    return weights + gradients + states + bucket


def _process(
    who: str,
    count: int,
    gpus: float,
    kept: int,
    passing: int,
    load: int,
    held: int,
    advice: Iterable[str],
    *,
    together: bool,
) -> ProcessMemory:
    """load: bytes of RAM while the models are loaded, before they are on a GPU. held: bytes that stay in RAM."""
    if gpus:
        host, kept = GPU_PROGRAM + load + held, kept + CONTEXT
    else:
        kept += PROGRAM + held
        kept = max(kept, PROGRAM + load)
        host = kept + passing
    return ProcessMemory(who, count, gpus, kept, passing, host, together, tuple(advice))


def _activations(config: RunConfig, sizes: ModelSizes) -> int:
    """What a micro-batch of the longest rows leaves for the backward pass, and its logits, in bytes; about."""
    pilot, number = config.pilot, _BYTES[config.pilot.dtype]
    tokens = pilot.micro_batch_size * config.data.cutoff_tokens
    width, inner = sizes.hidden_size, sizes.inner_size or 4 * sizes.hidden_size
    # inputs of projections, norms (in fp32) and the activation function; a dropout of adapters keeps their inputs too
    layer = number * (10 * width + 4 * inner) + 8 * width
    if pilot.method == "lora" and pilot.lora.dropout:
        layer += (number + 1) * (6 * width + inner)
    kept = layer + sizes.layers * number * width if pilot.gradient_checkpointing else sizes.layers * layer
    # logits, their logarithms, probabilities and gradients; every token may be a target
    return tokens * (kept + 20 * sizes.vocab_size)


def _table(sizes: ModelSizes) -> int:
    """Numbers in the largest matrix: the embedding."""
    return sizes.vocab_size * sizes.hidden_size
