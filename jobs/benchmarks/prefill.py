"""What the Copilot costs at the prompt: prefill time, fused against Pilot, by batch and prompt length.

python jobs/benchmarks/prefill.py [--batches 1 8] [--prompts 64 256 1024] [--rounds 8] [--dtype bf16] [--device cuda]

Pilot alone and fused model (lambda 0.5) read the same prompt up to the logits of its next token, in turn; a pair is one of
each. The Copilot decodes one row there, but projects the memory (question and states) of every prompt position in each
layer that attends to it. Needs torch, not Ray.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fused_models import add_model_options, device_line, load_models, synchronise
from workload import BUILTIN, print_table, spread, write_json

from tc_ray.models.fusion import FusedModel

LAM = 0.5


@torch.inference_mode()
def measure(fused: FusedModel, batch: int, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds a prefill of both, and their ratio."""
    generator = torch.Generator().manual_seed(batch * length)
    ids = torch.randint(2, fused.vocab_size, (batch, length), generator=generator).to(arguments.device)
    seconds: dict[str, list[float]] = {"pilot": [], "fused": []}
    for number in range(arguments.rounds + 1):  # the first pair warms up
        for name in ("pilot", "fused") if number % 2 == 0 else ("fused", "pilot"):
            model, options = (fused.pilot, {}) if name == "pilot" else (fused, {"lam": LAM})
            synchronise(arguments.device)
            began = time.perf_counter()
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)
            synchronise(arguments.device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    pairs = [f / p for f, p in zip(seconds["fused"], seconds["pilot"], strict=True)]
    return {
        "batch_size": batch,
        "prompt_tokens": length,
        "pilot_seconds": spread(seconds["pilot"]),
        "fused_seconds": spread(seconds["fused"]),
        "median_of_pair_ratios": statistics.median(pairs),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024], help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=8, help="pairs measured")
    add_model_options(parser, BUILTIN)
    arguments = parser.parse_args()
    fused = load_models(arguments)
    results = [measure(fused, batch, length, arguments) for batch in arguments.batches for length in arguments.prompts]
    print(device_line(arguments.device))
    print_table(
        f"prefill, {arguments.dtype}, Copilot of {len(fused.copilot.layers)} layers",
        ["batch x tokens", "Pilot ms", "fused ms", "median pair ratio"],
        [
            [
                f"{row['batch_size']} x {row['prompt_tokens']}",
                f"{1000 * row['pilot_seconds']['median']:.1f}",
                f"{1000 * row['fused_seconds']['median']:.1f}",
                f"{row['median_of_pair_ratios']:.3f}",
            ]
            for row in results
        ],
    )
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "json"}
    write_json(arguments.json, {"machine": device_line(arguments.device), "settings": settings, "prefill": results})


if __name__ == "__main__":
    main()
