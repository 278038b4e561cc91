"""What the Copilot costs at inference: decode time a token, fused against Pilot, beside the bound that the weights set.

python jobs/benchmarks/decoding.py [--batches 1 8 32] [--prompt 80] [--new-tokens 48] [--dtype bf16] [--device cuda]

Pilot alone and fused model (lambda 0.5, own feedback) decode the same tokens, step by step in turn, each with its own caches;
a pair is one step of each. Decoding reads every weight once a step, so its time is bounded below by their bytes: the
bound of the ratio is (Pilot's + Copilot's bytes) / Pilot's. Needs torch, not Ray.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
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
WARM_UP_STEPS = 4


def pilot_bytes(fused: FusedModel) -> int:
    """Bytes of weights that one decoding step of the Pilot reads: all but the embedding, of which it reads a row."""
    head = fused.pilot.get_output_embeddings().weight
    embedding = fused.pilot.get_input_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in fused.pilot.parameters())
    return total if head is embedding else total - embedding.numel() * embedding.element_size()


def copilot_bytes(fused: FusedModel) -> int:
    """Bytes that the Copilot adds: its layers, projections and W_out, and the matrix of its feedback in place of W_in."""
    copilot = fused.copilot
    read = [p for name, p in copilot.named_parameters() if not name.endswith("_embedding.weight")]
    return sum(p.numel() * p.element_size() for p in read)


def steps(model: Any, ids: torch.Tensor, tokens: torch.Tensor, **options: Any) -> Callable[[int], None]:
    """Prefill `ids`, and a function that decodes token i."""
    cache = None
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
    cache = out.past_key_values
    mask = torch.ones(ids.shape[0], ids.shape[1] + tokens.shape[1], dtype=torch.long, device=ids.device)

    def step(number: int) -> None:
        position = ids.shape[1] + number
        made = model(
            input_ids=tokens[:, number : number + 1],
            attention_mask=mask[:, : position + 1],
            position_ids=torch.full((ids.shape[0], 1), position, device=ids.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        made.logits[:, -1].argmax(-1)

    return step


@torch.inference_mode()
def measure(fused: FusedModel, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of both, and their ratio, at one batch size."""
    generator = torch.Generator().manual_seed(batch)
    draw = (batch, arguments.prompt + arguments.new_tokens)
    ids = torch.randint(2, fused.vocab_size, draw, generator=generator).to(arguments.device)
    prompt, tokens = ids[:, : arguments.prompt], ids[:, arguments.prompt :]
    run = {"pilot": steps(fused.pilot, prompt, tokens), "fused": steps(fused, prompt, tokens, lam=LAM)}
    seconds: dict[str, list[float]] = {"pilot": [], "fused": []}
    for number in range(arguments.new_tokens):
        for name in ("pilot", "fused") if number % 2 == 0 else ("fused", "pilot"):
            synchronise(arguments.device)
            began = time.perf_counter()
            run[name](number)
            synchronise(arguments.device)
            if number >= WARM_UP_STEPS:
                seconds[name].append(time.perf_counter() - began)
    pairs = [f / p for f, p in zip(seconds["fused"], seconds["pilot"], strict=True)]
    of_pilot, of_fused = spread(seconds["pilot"]), spread(seconds["fused"])
    return {
        "batch_size": batch,
        "pilot_seconds": of_pilot,
        "fused_seconds": of_fused,
        "ratio_of_medians": of_fused["median"] / of_pilot["median"],
        "median_of_pair_ratios": statistics.median(pairs),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=80, help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens decoded")
    add_model_options(parser, BUILTIN)
    arguments = parser.parse_args()
    fused = load_models(arguments)
    read = pilot_bytes(fused), copilot_bytes(fused)
    bound = sum(read) / read[0]
    results = [measure(fused, batch, arguments) for batch in arguments.batches]
    print(device_line(arguments.device))
    print_table(
        f"decoding {arguments.new_tokens} tokens after {arguments.prompt}, {arguments.dtype}, "
        f"Copilot of {len(fused.copilot.layers)} layers and {fused.copilot.output.out_features} output tokens",
        ["batch", "Pilot ms a step", "fused ms a step", "ratio", "median pair ratio", "bound", "ratio / bound"],
        [
            [
                str(row["batch_size"]),
                f"{1000 * row['pilot_seconds']['median']:.2f}",
                f"{1000 * row['fused_seconds']['median']:.2f}",
                f"{row['ratio_of_medians']:.3f}",
                f"{row['median_of_pair_ratios']:.3f}",
                f"{bound:.3f}",
                f"{row['median_of_pair_ratios'] / bound:.3f}",
            ]
            for row in results
        ],
    )
    print(f"bound: the Pilot reads {read[0] / 1e6:.0f} MB of weights a step, the Copilot adds {read[1] / 1e6:.0f} MB")
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "json"}
    write_json(
        arguments.json,
        {
            "machine": device_line(arguments.device),
            "settings": settings,
            "bytes": read,
            "bound": bound,
            "decoding": results,
        },
    )


if __name__ == "__main__":
    main()
