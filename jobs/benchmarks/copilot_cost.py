"""What the Copilot costs: its training against the Pilot's, and fused decoding against the Pilot's, in one process.

python jobs/benchmarks/copilot_cost.py [--rounds 12] [--batch-size 16] [--tokens 80] [--targets 12] [--threads 1]

Training: a round is one Pilot step (with its record) and `copilot.steps_per_round` Copilot steps, each drawing from a
buffer of real records and padding them, as the learner does. Decoding: `generate` of a fixed number of tokens by the Pilot
alone and by the fused model (lambda 0.5), prompt included, alternating. Needs no Ray.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from workload import BUILTIN, Batch, machine, make_batch, model_folder, print_table, recipe_config, spread, write_json

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.batching import batch_from_records
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.copilot.learner import Learner
from tc_ray.mistakelog.records import Records
from tc_ray.models.copilot import Copilot
from tc_ray.models.copilot.model import choose_layers
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot import DTYPES, PilotStep, add_adapters, load_pilot
from tc_ray.pilot.recording import to_records

DECODE_BATCHES = (1, 8)
LAM = 0.5


def pilot_step(
    step: PilotStep, optimizer: torch.optim.Optimizer, batch: Batch, number: int, config: RunConfig
) -> Records:
    """One Pilot round with its record, as in `tc_ray.pilot.loop` without DeepSpeed."""
    ids, lengths, starts = batch.tensors()
    loss, record = step(ids, lengths, starts, 1.0 / batch.target_tokens)
    loss.backward()
    assert record is not None
    records = to_records(
        record,
        input_ids=batch.input_ids,
        lengths=batch.lengths,
        target_start=batch.target_start,
        sample_id=batch.sample_id,
        seen=np.zeros(len(batch.lengths), np.int16),
        round_number=number,
        rank=0,
        attempt=1,
        positions=config.log.positions,
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, config.pilot.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return records


def training(arguments: argparse.Namespace, path: Path) -> tuple[dict[str, Any], Copilot]:
    """Seconds of a Pilot step and of a Copilot step, alternating; and the Copilot."""
    pilot = load_pilot(path, dtype=DTYPES[arguments.dtype])
    pilot.config.use_cache = False
    config = recipe_config(
        pilot.config.num_hidden_layers,
        pilot={"dtype": arguments.dtype},
        copilot={"dtype": arguments.dtype, "batch_size": arguments.batch_size},
    )
    step = PilotStep(add_adapters(pilot, config.pilot), top_k=config.log.top_k).train()
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=config.pilot.learning_rate)
    steps_per_round = config.copilot.steps_per_round
    target_ids = min(arguments.target_ids, pilot.config.vocab_size)
    copilot = Copilot.from_decoder(
        path,
        choose_layers(None, config.copilot.every, pilot.config.num_hidden_layers),
        pilot=pilot,
        output_ids=torch.arange(target_ids),
    )
    learner = Learner(copilot, config.copilot, total_steps=steps_per_round * (arguments.rounds + 1))
    buffer = RoundBuffer(config.copilot.buffer_rounds)
    pilot_seconds, copilot_seconds = [], []
    pilot_targets = copilot_targets = 0
    for number in range(arguments.rounds + 1):  # the first round warms up
        batch = make_batch(
            number,
            batch_size=arguments.batch_size,
            tokens=arguments.tokens,
            targets=arguments.targets,
            vocab_size=pilot.config.vocab_size,
            target_ids=target_ids,
        )
        began = time.perf_counter()
        records = pilot_step(step, optimizer, batch, number + 1, config)
        taken = time.perf_counter() - began
        buffer.add(f"round-{number}", records)
        if number:
            pilot_seconds.append(taken)
            pilot_targets += batch.target_tokens
        for at in range(steps_per_round):
            began = time.perf_counter()
            result = learner.step(batch_from_records(buffer.draw(arguments.batch_size, (number, at))))
            taken = time.perf_counter() - began
            if number:
                copilot_seconds.append(taken)
                copilot_targets += result.tokens
    pilot_token, copilot_token = sum(pilot_seconds) / pilot_targets, sum(copilot_seconds) / copilot_targets
    step_ratio = statistics.median(copilot_seconds) / statistics.median(pilot_seconds)
    return {
        "copilot_layers": len(copilot.layers),
        "steps_per_round": steps_per_round,
        "pilot_step_seconds": spread(pilot_seconds),
        "copilot_step_seconds": spread(copilot_seconds),
        "pilot_seconds_per_target_token": pilot_token,
        "copilot_seconds_per_target_token": copilot_token,
        "ratio_per_target_token": copilot_token / pilot_token,
        "ratio_per_record": step_ratio,
        "ratio_per_round": steps_per_round * step_ratio,
    }, copilot


def decoding(arguments: argparse.Namespace, path: Path, copilot: Copilot) -> list[dict[str, Any]]:
    """Seconds a decoded token of the Pilot and of the fused model, by batch size."""
    dtype = DTYPES[arguments.dtype]
    pilot = load_pilot(path, dtype=dtype).eval()
    fused = FusedModel.join(pilot, copilot.to(dtype).eval(), lam=LAM)
    lengths: dict[str, Any] = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens}
    results = []
    for batch_size in DECODE_BATCHES:
        ids = torch.randint(2, pilot.config.vocab_size, (batch_size, arguments.tokens - arguments.targets))
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **lengths}
        seconds: dict[str, list[float]] = {"pilot": [], "fused": []}
        for turn in range(arguments.rounds + 1):  # the first turn warms up
            for name in ("pilot", "fused") if turn % 2 == 0 else ("fused", "pilot"):
                model = pilot if name == "pilot" else fused
                began = time.perf_counter()
                out = model.generate(ids, **options)
                taken = time.perf_counter() - began
                assert out.shape[1] == ids.shape[1] + arguments.new_tokens
                if turn:
                    seconds[name].append(taken / arguments.new_tokens)
        pairs = [f / p for f, p in zip(seconds["fused"], seconds["pilot"], strict=True)]
        of_pilot, of_fused = spread(seconds["pilot"]), spread(seconds["fused"])
        results.append(
            {
                "batch_size": batch_size,
                "pilot_seconds_per_token": of_pilot,
                "fused_seconds_per_token": of_fused,
                "ratio_of_medians": of_fused["median"] / of_pilot["median"],
                "median_of_pair_ratios": statistics.median(pairs),
            }
        )
    return results


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=12, help="rounds of training, and of decoding, measured (default 12)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="examples a Pilot round and records a Copilot step")
    parser.add_argument("--tokens", type=int, default=80, help="mean tokens a sequence (SVAMP recipe: 80)")
    parser.add_argument("--targets", type=int, default=12, help="completion tokens a sequence")
    parser.add_argument(
        "--target-ids", type=int, default=200, help="different tokens in completions: the Copilot's output"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded")
    parser.add_argument("--model", default=BUILTIN, help="model folder, or the builtin name")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    path = model_folder(arguments.model)
    trained, copilot = training(arguments, path)
    decoded = decoding(arguments, path, copilot)
    result: dict[str, Any] = {
        "machine": machine(),
        "model": arguments.model,
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "json"},
        "training": trained,
        "decoding": decoded,
    }
    print(result["machine"])
    print_table(
        f"training on {arguments.model}, {arguments.batch_size} x {arguments.tokens} tokens, "
        f"Copilot of {trained['copilot_layers']} layers",
        ["", "ms a step", "ms a target token"],
        [
            [
                name,
                f"{1000 * trained[f'{name.lower()}_step_seconds']['median']:.1f}",
                f"{1000 * trained[f'{name.lower()}_seconds_per_target_token']:.3f}",
            ]
            for name in ("Pilot", "Copilot")
        ],
    )
    print(
        f"Copilot / Pilot: {trained['ratio_per_record']:.3f} a record, {trained['ratio_per_target_token']:.3f} a target token, "
        f"{trained['ratio_per_round']:.3f} a round of {trained['steps_per_round']} Copilot steps"
    )
    print_table(
        f"decoding {arguments.new_tokens} tokens",
        ["batch", "Pilot ms a token", "fused ms a token", "ratio", "median pair ratio"],
        [
            [
                str(row["batch_size"]),
                f"{1000 * row['pilot_seconds_per_token']['median']:.1f}",
                f"{1000 * row['fused_seconds_per_token']['median']:.1f}",
                f"{row['ratio_of_medians']:.3f}",
                f"{row['median_of_pair_ratios']:.3f}",
            ]
            for row in decoded
        ],
    )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
