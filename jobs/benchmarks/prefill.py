"""What the Copilot costs at the prompt, by batch and prompt length; and what a server would save by sharing forward passes.

python jobs/benchmarks/prefill.py [--batches 1 8] [--prompts 64 256 1024] [--rounds 8] [--dtype bf16] [--device cuda]
python jobs/benchmarks/prefill.py --together 8 --prompts 40 80 160 [--running 32 --chunk 64] [--rounds 8] [--dtype fp32]

Pilot alone and fused model (lambda 0.5) read the same prompt up to the logits of its next token, in turn; a pair is one of
each. The Copilot decodes one row there, but projects the memory (question and states) of every prompt position in each
layer that attends to it. Needs torch, not Ray.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fused_models import add_model_options, device_line, load_models, synchronise
from workload import BUILTIN, print_table, spread, write_json

from tc_ray.models.decoding.batch import FusedBatch
from tc_ray.models.decoding.prefill import Prefill
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


def in_turn(calls: tuple[Callable[[], Any], Callable[[], Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of two calls in turn, the median of the pairs' ratios (second / first), and its quartiles."""
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    seconds: tuple[list[float], list[float]] = [], []
    for number in range(arguments.rounds + 1):  # the first pair warms up
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            synchronise(arguments.device)
            began = clock()
            calls[which]()
            synchronise(arguments.device)
            if number:
                seconds[which].append(clock() - began)
    ratios = spread([second / first for first, second in zip(*seconds, strict=True)])
    return {"apart_seconds": spread(seconds[0]), "together_seconds": spread(seconds[1]), "ratio": ratios}


def prompts(fused: FusedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Random ids of these lengths."""
    dice = torch.Generator().manual_seed(3)
    return [torch.randint(2, fused.vocab_size, (length,), generator=dice).tolist() for length in lengths]


@torch.inference_mode()
def together(fused: FusedModel, lengths: Sequence[int], lam: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prompts of these lengths one by one, against all in one pass."""
    rows, width = prompts(fused, lengths), max(lengths)

    def one_by_one() -> None:
        for row in rows:
            Prefill(fused, row, lam).advance(len(row))

    def in_one_pass() -> None:
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=arguments.device)
        lefts = torch.tensor([width - len(row) for row in rows], device=arguments.device)
        mask = (torch.arange(width, device=arguments.device) >= lefts[:, None]).long()
        fused(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), lam=lam)

    return in_turn((one_by_one, in_one_pass), arguments)


@torch.inference_mode()
def one_pass(
    fused: FusedModel, running: int, chunk: int, context: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A step of `running` rows and a chunk of a prompt, by lambda 0, against one pass over as many tokens."""
    batch, (prompt, both) = FusedBatch(fused), prompts(fused, (chunk, running + chunk))
    batch.reserve([batch.need(context, 2 * arguments.rounds + 4, False)] * running)
    for row in prompts(fused, [context] * running):
        prefill = Prefill(fused, row, 0.0)
        prefill.advance(context)
        batch.join(prefill)

    def apart() -> None:
        batch.step(both[:running])
        Prefill(fused, prompt, 0.0).advance(chunk)

    def shared() -> None:
        ids = torch.tensor([both], device=arguments.device)
        with fused.tap.recording():
            fused.pilot(input_ids=ids, past_key_values=fused.new_cache(), use_cache=True, logits_to_keep=running + 1)
        fused.tap.take()

    return in_turn((apart, shared), arguments)


def measure_sharing(fused: FusedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every row of the table of `--together`."""
    rows, count = {}, arguments.together
    for length in arguments.prompts:
        mixed = [length // 2 + round(i * length / max(1, count - 1)) for i in range(count)]
        for lam, name in ((0.0, "Pilot"), (LAM, "fused")):
            rows[f"{count} prompts of {length}, {name}"] = together(fused, [length] * count, lam, arguments)
            rows[f"{count} prompts of {mixed[0]} to {mixed[-1]}, {name}"] = together(fused, mixed, lam, arguments)
    name = f"a step of {arguments.running} rows and {arguments.chunk} prompt tokens, Pilot (bound)"
    rows[name] = one_pass(fused, arguments.running, arguments.chunk, 104, arguments)
    return rows


def print_sharing(rows: dict[str, Any], title: str) -> None:
    """The table of `--together`."""
    cells = [
        [
            name,
            f"{1000 * row['apart_seconds']['median']:.0f}",
            f"{1000 * row['together_seconds']['median']:.0f}",
            f"{row['ratio']['median']:.3f}",
            f"{row['ratio']['q25']:.3f} to {row['ratio']['q75']:.3f}",
        ]
        for name, row in rows.items()
    ]
    print_table(title, ["", "apart ms", "one pass ms", "ratio", "interval"], cells)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024], help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=8, help="pairs measured")
    parser.add_argument("--together", type=int, help="measure so many prompts in one pass instead")
    parser.add_argument("--running", type=int, default=32, help="rows of the step that shares a pass with a prompt")
    parser.add_argument("--chunk", type=int, default=64, help="prompt tokens of that pass")
    add_model_options(parser, BUILTIN)
    arguments = parser.parse_args()
    fused = load_models(arguments)
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "json"}
    if arguments.together:
        shared = measure_sharing(fused, arguments)
        print(device_line(arguments.device))
        print_sharing(shared, f"one pass / apart, {arguments.dtype}, Copilot of {len(fused.copilot.layers)} layers")
        write_json(arguments.json, {"machine": device_line(arguments.device), "settings": settings, "sharing": shared})
        return
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
    write_json(arguments.json, {"machine": device_line(arguments.device), "settings": settings, "prefill": results})


if __name__ == "__main__":
    main()
