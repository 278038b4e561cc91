"""What padding costs the Pilot, and what `data.group_by_length` and `pilot.packing` save: tokens per second on a file of examples.

python jobs/benchmarks/padding.py FILE [--rounds 12] [--batch-size 16] [--cutoff 256] [--template plain] [--threads 1]

The padding of all rounds of one epoch is counted exactly; it does not depend on the machine. Time: the same rows are trained on
in four ways, in turn: rounds of any lengths, grouped, packed, and both. So the ratios compare equal work, with the record's
taps, the backward pass and the optimizer. Needs no Ray.
"""

from __future__ import annotations

import argparse
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

from fused_models import synchronise
from workload import BUILTIN, DTYPE, machine, model_folder, print_table, recipe_config, write_json

from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.batches import RoundOrder, collate
from tc_ray.data.prepared.packing import shared_rows
from tc_ray.data.source.readers import iter_records
from tc_ray.models.pilot.load import DTYPES, add_adapters, load_pilot
from tc_ray.pilot.engine import pilot_step, step_inputs

WAYS = {"neither": (False, False), "grouped": (True, False), "packed": (False, True), "both": (True, True)}
"""(group_by_length, packing) by name."""


def encoded(file: Path, tokenizer: Any, config: RunConfig) -> list[dict[str, Any]]:
    """The examples of a file as training rows."""
    encoder = Encoder(config.data, tokenizer, config.run.seed)
    found = (row for record in iter_records(file) for row in encoder.rows(record, held_out=False))
    rows = [row for row in found if row.get("input_ids")]
    return [row | {"sample_id": number} for number, row in enumerate(rows)]


def cells(lengths: np.ndarray, most: int, packing: bool) -> int:
    """Tokens that a forward pass of one micro-batch computes, padding among them."""
    if not packing:
        return len(lengths) * int(lengths.max())
    row, width = shared_rows(lengths.tolist(), most)
    return (int(row.max()) + 1) * width


def padding(lengths: np.ndarray, config: RunConfig) -> dict[str, float]:
    """Share of padding in all rounds of one epoch, by way."""
    shares = {}
    for name, (grouped, packing) in WAYS.items():
        order = RoundOrder(len(lengths), config.pilot.batch_size, 1, 17, lengths=lengths if grouped else None)
        taken = [lengths[order.sample_rows(number)] for number in range(1, order.rounds + 1)]
        computed = sum(cells(one, config.data.cutoff_tokens, packing) for one in taken)
        shares[name] = 1 - sum(int(one.sum()) for one in taken) / computed
    return shares


class Trained:
    """The Pilot in training."""

    def __init__(self, model: Path, config: RunConfig, device: str) -> None:
        pilot = load_pilot(model, dtype=DTYPES[config.pilot.dtype])
        pilot.config.use_cache = False
        self.step = pilot_step(add_adapters(pilot, config.pilot).to(device), config).train()
        self.device = torch.device(device)
        trained = [p for p in self.step.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.pilot.learning_rate)

    def round(self, rows: list[dict[str, Any]], row_tokens: int | None) -> tuple[float, float]:
        """Wall and processor seconds of a round."""
        began, busy = time.perf_counter(), time.process_time()
        batch = collate(rows, 0)
        scale = 1.0 / int((batch["lengths"] - batch["target_start"]).sum())
        loss, _ = self.step(loss_scale=scale, **step_inputs(batch, self.device, row_tokens=row_tokens))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronise(self.device.type)
        return time.perf_counter() - began, time.process_time() - busy


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Padding by way, and the time of the same rows in each."""
    from transformers import AutoConfig, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    folder = model_folder(arguments.model)
    config = recipe_config(
        AutoConfig.from_pretrained(folder).num_hidden_layers,
        pilot={"dtype": arguments.dtype, "batch_size": arguments.batch_size, "micro_batch_size": arguments.batch_size},
        data={"template": arguments.template, "plain_template": "{prompt}\n", "cutoff_tokens": arguments.cutoff},
    )
    rows = encoded(arguments.file, AutoTokenizer.from_pretrained(folder), config)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    shares = padding(lengths, config)
    pilot, size = Trained(folder, config, arguments.device), arguments.batch_size
    chosen = np.random.default_rng(17).permutation(len(rows))[: arguments.rounds * size]
    orders = {
        grouped: RoundOrder(len(chosen), size, 1, 17, lengths=lengths[chosen] if grouped else None)
        for grouped in (False, True)
    }
    seconds = {name: np.zeros((arguments.rounds, 2)) for name in WAYS}
    names = list(WAYS)
    for number in range(arguments.rounds + 1):  # the first is for warming up
        for name in names[number % 4 :] + names[: number % 4]:
            grouped, packing = WAYS[name]
            taken = chosen[orders[grouped].sample_rows(max(1, number))]
            spent = pilot.round([rows[at] for at in taken], arguments.cutoff if packing else None)
            if number:
                seconds[name][number - 1] = spent
    tokens = int(lengths[chosen].sum())
    return {
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "json"},
        "examples": len(rows),
        "mean_tokens": float(lengths.mean()),
        "longest": int(lengths.max()),
        "tokens": tokens,
        "padding": shares,
        "seconds": {
            name: {"wall": found[:, 0].tolist(), "processor": found[:, 1].tolist()} for name, found in seconds.items()
        },
        "tokens_per_processor_second": {name: tokens / float(found[:, 1].sum()) for name, found in seconds.items()},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="examples, in any shape that data.train takes")
    parser.add_argument("--rounds", type=int, default=12, help="rounds trained in each way (default 12)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--cutoff", type=int, default=256, help="as data.cutoff_tokens (default 256)")
    parser.add_argument("--template", choices=("plain", "chat"), default="plain")
    parser.add_argument("--model", default=BUILTIN, help="model folder, or the builtin name")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(result["machine"])
    speed, base = result["tokens_per_processor_second"], result["tokens_per_processor_second"]["neither"]
    table = [
        [name, f"{100 * result['padding'][name]:.1f}%", f"{speed[name]:.0f}", f"{speed[name] / base:.2f}"]
        for name in WAYS
    ]
    title = (
        f"{arguments.file.parent.name}/{arguments.file.name}: {result['examples']} examples of {result['mean_tokens']:.0f} "
        f"tokens, the longest {result['longest']}; {arguments.rounds} rounds of {arguments.batch_size}"
    )
    print_table(title, ["", "padding of an epoch", "tokens/s of the processor", "ratio"], table)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
