"""What adding gradients over Copilot learners costs: DistributedDataParallel against one flattened all-reduce after the backward pass.

python jobs/benchmarks/copilot_workers.py [--rounds 10] [--workers 2] [--batch-size 16] [--tokens 80] [--targets 12] [--threads 1]
python jobs/benchmarks/copilot_workers.py --hidden 256 --layers 6 --vocab 32000      (random weights, no download)

Each worker is a process with the Copilot of the SVAMP recipe and its slice of a random batch; they meet over gloo (nccl with
`--device cuda`, a GPU each). Timed is forward, backward and the sum over ranks; the optimizer step is the same for both. The order goes
round, and ratios are medians over rounds, of rank 0. `alone`: the same without a sum over ranks. Needs no Ray.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fused_models import device_line, synchronise, write_llama
from workload import BUILTIN, DTYPE, TOP_K, make_batch, model_folder, print_table, recipe_config, spread, write_json

from tc_ray.copilot.learner import Learner
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.copilot.model import choose_layers
from tc_ray.models.pilot.load import load_pilot

WARM_UP_ROUNDS = 2  # DistributedDataParallel orders its buckets after the first
FORMS = ("alone", "flattened", "overlapped")


def copilot_batch(number: int, arguments: argparse.Namespace, width: int, vocab_size: int) -> CopilotBatch:
    """Random records of `number`, one slice of a round's batch."""
    shape = {"batch_size": arguments.batch_size // arguments.workers, "targets": arguments.targets}
    ids, lengths, starts = make_batch(number, **shape, tokens=arguments.tokens, vocab_size=vocab_size).tensors()
    position = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
    rows = (starts - 1)[:, None] + torch.arange(arguments.targets)
    listed = (*rows.shape, TOP_K + 1)
    asked = int(starts.max())
    return CopilotBatch(
        question_ids=ids[:, :asked],
        question_mask=torch.arange(asked) < starts[:, None],
        rationale=torch.randn(*position.shape, width).to(torch.bfloat16),
        rationale_position=torch.where(position < (lengths - 1)[:, None], position, -1),
        row_position=rows,
        error_ids=torch.randint(vocab_size, listed),
        error_values=0.1 * torch.rand(listed),
    )


def gradients(learner: Learner, batch: CopilotBatch, form: str) -> None:
    """Forward, backward and, but for `alone`, the sum over ranks."""
    learner.optimizer.zero_grad()
    batch = batch.to(learner.device)
    if form == "overlapped":
        learner.forward(batch)[0].backward()
        return
    learner.batch_sums(batch)[0].backward()
    if form == "flattened":
        found = [p.grad for p in learner.parameters.values() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in found])
        dist.all_reduce(flat)
        for gradient, part in zip(found, flat.split([gradient.numel() for gradient in found]), strict=True):
            gradient.copy_(part.view_as(gradient))


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of a call that all ranks begin together."""
    dist.barrier()
    began = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - began


def worker(rank: int, arguments: argparse.Namespace, model: str, meeting: str, out: str) -> None:
    """One rank, in a process of its own; rank 0 writes the seconds of each form to `out`."""
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if arguments.device == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=arguments.workers,
        timeout=timedelta(seconds=60),  # a stalled collective is an error that names it, not a wait of half an hour
    )
    torch.manual_seed(0)
    pilot = load_pilot(model, dtype=torch.float32, random_weights=bool(arguments.hidden))
    shape = pilot.config
    config = recipe_config(shape.num_hidden_layers, copilot={"dtype": arguments.dtype}).copilot
    layers = choose_layers(None, config.every, shape.num_hidden_layers)
    output_ids = torch.arange(arguments.target_ids) if arguments.target_ids else None
    copilot = Copilot.from_decoder(
        model, layers, pilot=pilot, output_ids=output_ids, random_weights=bool(arguments.hidden)
    )
    del pilot
    learner = Learner(copilot, config, total_steps=1000, device=arguments.device, world_size=arguments.workers)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(WARM_UP_ROUNDS + arguments.rounds):
        batch = copilot_batch(number * arguments.workers + rank, arguments, shape.hidden_size, shape.vocab_size)
        turn = number % len(FORMS)
        for form in FORMS[turn:] + FORMS[:turn]:
            taken = timed(partial(gradients, learner, batch, form), arguments.device)
            if number >= WARM_UP_ROUNDS:
                seconds[form].append(taken)
    if rank == 0:
        numbers = sum(p.numel() for p in learner.parameters.values())
        torch.save({"seconds": seconds, "parameters": numbers}, out)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="of all workers together")
    parser.add_argument("--tokens", type=int, default=80, help="mean tokens per sequence")
    parser.add_argument("--targets", type=int, default=12, help="completion tokens per sequence")
    parser.add_argument("--target-ids", type=int, default=600, help="output tokens of the Copilot; 0: the vocabulary")
    parser.add_argument("--model", default=BUILTIN, help="model folder, or the builtin name")
    parser.add_argument("--hidden", type=int, help="a Llama of this width with random weights instead of --model")
    parser.add_argument("--layers", type=int, default=10, help="with --hidden")
    parser.add_argument("--vocab", type=int, default=32_000, help="with --hidden")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--threads", type=int, default=1, help="torch threads per worker")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-") as name:
        made = Path(name)
        model = made / "model" if arguments.hidden else model_folder(arguments.model)
        if arguments.hidden:
            write_llama(model, arguments.hidden, arguments.layers, arguments.vocab)
        given = (arguments, str(model), str(made / "meeting"), str(made / "seconds"))
        torch.multiprocessing.spawn(worker, given, nprocs=arguments.workers)
        found: dict[str, Any] = torch.load(made / "seconds")
    seconds = found["seconds"]
    result: dict[str, Any] = {"parameters": found["parameters"], "rows": {}}
    for form, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["flattened"], strict=True)]
        result["rows"][form] = {**spread(taken), "ratio_to_flattened": statistics.median(ratios)}
    print(device_line(arguments.device))
    print_table(
        f"{found['parameters']:,} trained numbers, {arguments.workers} workers, {arguments.rounds} rounds",
        ["sum over ranks", "median ms", "quartiles", "of flattened"],
        [
            [
                form,
                f"{1000 * row['median']:.0f}",
                f"{1000 * row['q25']:.0f} to {1000 * row['q75']:.0f}",
                f"{row['ratio_to_flattened']:.3f}",
            ]
            for form, row in result["rows"].items()
        ],
    )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
