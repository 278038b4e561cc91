"""The plan of a run: topology, batch arithmetic, sizes and predicted log bytes, computed without starting anything.

Rows and tokens are measured where the data was prepared before, estimated from a sample of the files otherwise, and
said to be unknown where neither is possible. Called by `tc-ray train --plan`.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tc_ray.config.schema import EMBEDDED, RunConfig

ROW_OVERHEAD_BYTES = 64
"""Key columns and offsets of one record."""
SAMPLE_ROWS = 200


@dataclass(frozen=True)
class Plan:
    """Numbers of a plan; None is 'cannot be known without the model or the data'."""

    config: dict[str, Any]
    rows: int | None
    mean_tokens: float | None
    mean_target_tokens: float | None
    rounds: int | None
    copilot_steps: int | None
    hidden_size: int | None
    pilot_parameters: int | None
    pilot_trainable: int | None
    copilot_parameters: int | None
    copilot_trainable: int | None
    log_bytes_per_round: int | None
    log_bytes: int | None
    free_bytes: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan as lines for a terminal."""
        config = RunConfig.model_validate(self.config)
        r, p, c = config.resources, config.pilot, config.copilot
        device = "GPU" if r.gpus else "CPU"
        precision = f"{p.method}, ZeRO stage {p.zero_stage}, {p.dtype}"
        lines = [
            f"run        {config.run.name} in {config.run.path}",
            f"pilot      {config.model.pilot}: {_count(self.pilot_parameters)} parameters, {_count(self.pilot_trainable)} trained ({precision})",
            f"           {r.pilot_workers} worker(s) x {r.pilot_cpus:g} CPU, {r.pilot_threads} thread(s), on {device}",
            f"copilot    {config.model.copilot or config.model.pilot}, {'layers ' + str(c.layers) if c.layers else f'every {c.every} layer(s)'}: "
            f"{_count(self.copilot_parameters)} parameters, {_count(self.copilot_trainable)} trained ({c.method}, {c.dtype})",
            f"           {r.copilot_workers} worker(s) x {r.copilot_cpus:g} CPU, {r.copilot_threads} thread(s), {c.schedule}, "
            f"buffer of {c.buffer_rounds} rounds",
            f"data       {config.data.train}: {_count(self.rows)} training rows, mean {_number(self.mean_tokens)} tokens, "
            f"{_number(self.mean_target_tokens)} of them targets",
            f"batch      {p.batch_size} a round = {r.pilot_workers} worker(s) x {p.micro_batch_size} x {config.accumulation_steps} accumulation step(s)",
            f"rounds     {_count(self.rounds)} in {p.epochs} epoch(s); Copilot steps {_count(self.copilot_steps)} "
            f"({c.steps_per_round} a round, {c.batch_size} records each)",
            f"log        {_bytes(self.log_bytes_per_round)} a round, {_bytes(self.log_bytes)} for the run; free disk {_bytes(self.free_bytes)}",
        ]
        return lines + [f"note       {note}" for note in self.notes]


def make_plan(config: RunConfig) -> Plan:
    """Plan of a run. Reads configs and data files; starts no Ray, loads no weights, writes nothing."""
    notes: list[str] = []
    shapes = _model_shapes(config, notes)
    rows, tokens, targets = _data_shape(config, notes)
    rounds = None
    if rows is not None:
        rounds = config.pilot.epochs * rows // config.pilot.batch_size
    if config.pilot.max_rounds is not None:
        rounds = min(rounds or config.pilot.max_rounds, config.pilot.max_rounds)
    per_round = None
    hidden = shapes.get("hidden_size")
    if tokens is not None and targets is not None and hidden and config.log.enabled:
        per_round = log_bytes_per_round(config, hidden_size=hidden, mean_tokens=tokens, mean_target_tokens=targets)
    total = per_round * rounds if per_round is not None and rounds is not None else None
    free = shutil.disk_usage(_existing(config.run.path)).free
    if total is not None and total > free:
        notes.append("the predicted log does not fit on the disk: free space, or lower pilot.epochs, log.top_k, or set log.positions=target")
    return Plan(
        config=config.model_dump(mode="json"), rows=rows, mean_tokens=tokens, mean_target_tokens=targets, rounds=rounds,
        copilot_steps=rounds * config.copilot.steps_per_round if rounds is not None and config.log.enabled else None,
        hidden_size=hidden, pilot_parameters=shapes.get("pilot"), pilot_trainable=shapes.get("pilot_trainable"),
        copilot_parameters=shapes.get("copilot"), copilot_trainable=shapes.get("copilot_trainable"),
        log_bytes_per_round=per_round, log_bytes=total, free_bytes=free, notes=notes,
    )


def log_bytes_per_round(config: RunConfig, *, hidden_size: int, mean_tokens: float, mean_target_tokens: float) -> int:
    """Bytes of one round's records: bf16 states, int32 + fp32 error entries, ids and per-token numbers."""
    states = mean_tokens - 1 if config.log.positions == "all" else mean_target_tokens
    per_target = (config.log.top_k + 1) * 8 + 4 + 4 + 1
    record = states * hidden_size * 2 + mean_tokens * 4 + mean_target_tokens * per_target + ROW_OVERHEAD_BYTES
    return int(record * config.pilot.batch_size)


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def _model_shapes(config: RunConfig, notes: list[str]) -> dict[str, int]:
    """Parameter counts, from the models' configs alone (meta device)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tc_ray.models.copilot.config import CopilotConfig
    from tc_ray.models.copilot.decoder_only import Copilot, choose_layers
    from tc_ray.models.pilot import add_adapters
    from tc_ray.models.source import resolve_model

    try:
        path = resolve_model(config.model.pilot, config.model.cache)
        base = resolve_model(config.model.copilot, config.model.cache) if config.model.copilot else path
        pilot_config, base_config = AutoConfig.from_pretrained(path), AutoConfig.from_pretrained(base)
    except Exception as error:
        # a hub id without the hub is no reason to refuse a plan; the run itself will
        reason = str(error).strip().splitlines()[0]
        notes.append(f"model sizes unknown: the config of {config.model.pilot} cannot be read here ({reason[:120]})")
        return {}
    with torch.device("meta"):
        pilot = add_adapters(AutoModelForCausalLM.from_config(pilot_config), config.pilot)
        layers = choose_layers(config.copilot.layers, config.copilot.every, base_config.num_hidden_layers)
        fields = base_config.to_dict() | {"num_hidden_layers": len(layers)}
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][: len(layers)]
        copilot = Copilot(
            CopilotConfig(
                decoder=fields, pilot_hidden_size=pilot_config.hidden_size, vocab_size=pilot_config.vocab_size,
                producing_state=config.copilot.producing_state,
            )
        )
        own = sum(p.numel() for p in copilot.parameters())
        if config.copilot.method == "lora":
            from tc_ray.copilot.learner import with_adapters

            copilot = with_adapters(copilot, config.copilot)
    return {
        "hidden_size": pilot_config.hidden_size,
        "pilot": sum(p.numel() for n, p in pilot.named_parameters() if "lora_" not in n),
        "pilot_trainable": sum(p.numel() for p in pilot.parameters() if p.requires_grad),
        "copilot": own,
        "copilot_trainable": sum(p.numel() for p in copilot.parameters() if p.requires_grad),
    }


def _data_shape(config: RunConfig, notes: list[str]) -> tuple[int | None, float | None, float | None]:
    """(training rows, mean tokens, mean target tokens): as prepared in the run folder, else estimated."""
    prepared = config.run.path / "data" / "train.parquet"
    if prepared.is_file():
        import numpy as np

        from tc_ray.data.train_table import TrainTable

        table = TrainTable(prepared)
        rows = np.arange(len(table))
        return len(table), table.tokens(rows) / len(table), table.target_tokens(rows) / len(table)
    from tc_ray.data.estimate import estimate

    found = estimate(config.data, config.model, sample_rows=SAMPLE_ROWS, seed=config.run.seed)
    if found is None:
        what = "it is generated when the run starts" if config.data.train == EMBEDDED else "its tokenizer or files cannot be read here"
        notes.append(f"data size unknown: {what}")
        return None, None, None
    notes.append(f"data size estimated from {found.sampled} rows; `tc-ray train` measures it")
    return found.rows, found.mean_tokens, found.mean_target_tokens


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "unknown"
    size = float(value)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
