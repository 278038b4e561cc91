"""Cost of the Mistake Log to the Pilot: time of a round with logging on against off, interleaved in one process.

python jobs/benchmarks/logging_overhead.py [--rounds 40] [--batch-size 16] [--tokens 80] [--targets 12] [--threads 1]
    [--rationale pooled | all | 0,9,19,29] [--error top-k | dense] [--top-k 16] [--device cuda]

One model with two training forwards on the same weights: one leaves a record (taps, errors, conversion, hand-over
to the writer's queue), the other does not. The writer thread and a real Ledger write a real Delta table in a temporary
folder meanwhile, so what they take from the cores counts too. A pair of rounds trains on one batch; the order is on-off,
off-on, ..., so that drift of the machine falls on both. Needs no Ray.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from workload import (
    BUILTIN,
    DTYPE,
    TOP_K,
    Batch,
    machine,
    make_batch,
    model_folder,
    print_table,
    recipe_config,
    spread,
    write_json,
)

from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.models.pilot.load import DTYPES, add_adapters, load_pilot
from tc_ray.models.pilot.step import PilotStep
from tc_ray.pilot.engine import pilot_step
from tc_ray.pilot.record import Recorder, log_metadata

WARM_UP_PAIRS = 2


class Rounds:
    """Rounds of a Pilot with and without a record, on the same weights and optimizer."""

    def __init__(self, model: Path, log_folder: Path, arguments: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        pilot = load_pilot(model, dtype=DTYPES[arguments.dtype])
        pilot.config.use_cache = False
        self.device = torch.device(arguments.device)
        self.config = recipe_config(
            pilot.config.num_hidden_layers,
            pilot={"dtype": arguments.dtype, "method": arguments.method},
            log={
                "top_k": arguments.top_k,
                "rationale": arguments.rationale,
                "error": arguments.error,
                "path": str(log_folder),
            },
        )
        pilot = add_adapters(pilot, self.config.pilot).to(self.device)
        shape = pilot.config
        recording = pilot_step(pilot, self.config).train()
        self.steps = {True: recording, False: PilotStep(pilot, top_k=1, record=False).train()}
        self.trained = [p for p in pilot.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.config.pilot.learning_rate)
        store = LogStore.create(log_folder, log_metadata(self.config, shape, AutoTokenizer.from_pretrained(model)))
        run = self.config.run.name
        self.ledger = Ledger(store.location, writers=1, run=run)
        writer = RecordWriter(
            store.location,
            self.ledger.commit,
            self.config.log,
            run=run,
            rank=0,
            attempt=self.ledger.begin_attempt(0, 1),
        )
        self.recorder = Recorder(writer, self.config.log, seed=self.config.run.seed, device=self.device)
        self.logged = 0

    def run(self, batch: Batch, *, logging: bool) -> float:
        """One round, forward to optimizer step as in `tc_ray.pilot.loop`; seconds."""
        began = time.perf_counter()
        ids, lengths, starts = (tensor.to(self.device) for tensor in batch.tensors())
        loss, record = self.steps[logging](ids, lengths, starts, 1.0 / batch.target_tokens)
        if record is not None:
            self.logged += 1
            self.recorder.record(record, vars(batch), np.zeros(len(batch.lengths), np.int16), self.logged)
        del record
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.pilot.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if logging:
            self.recorder.end_round(self.logged)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the pairs; medians, ratio of medians and median of the pairs' ratios."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-") as folder:
        rounds = Rounds(model_folder(arguments.model), Path(folder) / "log", arguments)
        vocab_size = rounds.steps[True].model.config.vocab_size
        seconds: dict[bool, list[float]] = {True: [], False: []}
        tokens = 0
        for pair in range(WARM_UP_PAIRS + arguments.rounds):
            batch = make_batch(
                pair,
                batch_size=arguments.batch_size,
                tokens=arguments.tokens,
                targets=arguments.targets,
                vocab_size=vocab_size,
            )
            for logging in (True, False) if pair % 2 == 0 else (False, True):
                taken = rounds.run(batch, logging=logging)
                if pair >= WARM_UP_PAIRS:
                    seconds[logging].append(taken)
            tokens += batch.tokens if pair >= WARM_UP_PAIRS else 0
        rounds.recorder.writer.close()
        stats, state = rounds.recorder.metrics(), rounds.ledger.state()
    on, off = spread(seconds[True]), spread(seconds[False])
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    return {
        "machine": machine(),
        "model": arguments.model,
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "json"},
        "tokens_per_round": tokens / arguments.rounds,
        "on_seconds": on,
        "off_seconds": off,
        "ratio_of_medians": on["median"] / off["median"],
        "median_of_pair_ratios": statistics.median(ratios),
        "pair_ratio_quartiles": [float(np.quantile(ratios, q)) for q in (0.25, 0.75)],
        "log_bytes_per_round": state.bytes / state.round,
        "log_bytes_per_token": stats["bytes_per_token"],
        "blocked_seconds": stats["blocked_seconds"],
    }


def rationale(text: str) -> str | list[int]:
    """Argument of --rationale."""
    return text if text in ("pooled", "all") else [int(layer) for layer in text.split(",")]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="pairs of rounds measured (default 40)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=80, help="mean tokens a sequence (SVAMP recipe: 80)")
    parser.add_argument("--targets", type=int, default=12, help="completion tokens a sequence")
    parser.add_argument("--model", default=BUILTIN, help="model folder, or the builtin name")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rationale", type=rationale, default="pooled", help="as log.rationale; layers with commas")
    parser.add_argument("--error", choices=("top-k", "dense"), default="top-k", help="as log.error")
    parser.add_argument("--top-k", type=int, default=TOP_K, help=f"errors kept per token (default {TOP_K})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    result = measure(arguments)
    rows = [
        [name, f"{1000 * s['median']:.1f}", f"{1000 * s['q25']:.1f} to {1000 * s['q75']:.1f}"]
        for name, s in (("logging on", result["on_seconds"]), ("logging off", result["off_seconds"]))
    ]
    print(result["machine"])
    title = f"Pilot round on {arguments.model}, {arguments.batch_size} x {arguments.tokens} tokens, {arguments.rounds} pairs"
    print_table(title, ["", "median ms", "quartiles"], rows)
    low, high = result["pair_ratio_quartiles"]
    print(f"ratio of medians       {result['ratio_of_medians']:.4f}")
    print(f"median of pair ratios  {result['median_of_pair_ratios']:.4f} (quartiles {low:.4f} to {high:.4f})")
    blocked = f"waited {result['blocked_seconds']:.3f} s for the writer"
    print(
        f"log                    {result['log_bytes_per_round'] / 1e6:.2f} MB a round, {result['log_bytes_per_token']:.0f} B per token; the rounds {blocked}"
    )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
