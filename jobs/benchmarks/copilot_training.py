"""What training the Copilot costs in time and memory against the Pilot's step, by form of the loss, in one process.

python jobs/benchmarks/copilot_training.py [--shapes demo] [--rounds 8] [--batch-size 16] [--tokens 80] [--device cuda]
python jobs/benchmarks/copilot_training.py --hidden 256 --layers 6 --vocab 32000      (random weights, no download)

Steps: in each round the Pilot takes one step that leaves a record, and on that record Copilots take theirs: output on the
first `--target-ids` tokens or on the whole vocabulary, the loss by autograd over a dense [N, A] (what torch users would
write) and in blocks of columns (what the Copilot uses). Which comes first goes round; ratios are medians over the rounds of
(this / Pilot) within a round. `--shapes` takes sequences and steps per round of a recipe.
Parts of a step: forward, backward, optimizer, and the rest (clipping, sums) of the Copilot's own form.
Loss alone: both over a range of token counts N, whole vocabulary.

Peak memory is what the allocator held at most during one more step beyond what it held before it (weights, optimizer), the
gradients counted: on a GPU torch.cuda.max_memory_allocated, on a CPU the allocations that torch's profiler records. Scratch
memory of the CPU's matrix library is not in it. Needs torch, transformers and, for `--method lora`, peft; no Ray.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and stop lines

import torch
import torch.nn.functional as F
import yaml

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from clock import parts_of_step, peak_bytes, timed
from fused_models import device_line, write_llama
from workload import (
    BUILTIN,
    DTYPE,
    TOP_K,
    Batch,
    make_batch,
    model_folder,
    print_table,
    recipe_config,
    spread,
    write_json,
)

from tc_ray.copilot.learner import Learner
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.copilot.model import choose_layers
from tc_ray.models.losses import RootMeanSquare
from tc_ray.models.pilot.load import DTYPES, add_adapters, load_pilot
from tc_ray.models.pilot.step import PilotStep

FORMS = ("autograd", "blocks")
OWN = ("targets", "blocks")
"""The step that a run takes, whose parts are measured."""
SHAPES = {
    "svamp": {"tokens": 80, "targets": 12, "target_ids": 200, "steps_per_round": 6},
    "demo": {"tokens": 55, "targets": 6, "target_ids": 16, "steps_per_round": 6},
}
"""Mean tokens and completion tokens a sequence, different tokens in completions, Copilot steps per round, of two recipes."""
WARM_UP_ROUNDS = 1
SWEEP_ROUNDS = 3
SWEEP_WIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Token counts of the loss alone, in units of the width d."""


class Autograd(RootMeanSquare):
    """The loss as torch users would write it: f [N, A], its residual and both their derivatives are held."""

    def total(
        self, states: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Sum of squares, differentiated by autograd."""
        f = F.linear(states, weight).float()
        residual = f.scatter_add(1, places.clamp_min(0), -values.masked_fill(places < 0, 0.0))
        return residual.square().sum().double() + values.masked_fill(places >= 0, 0.0).double().square().sum()


def make_loss(form: str) -> RootMeanSquare:
    """The rmse by one of FORMS."""
    return Autograd() if form == "autograd" else RootMeanSquare()


class Steps:
    """A Pilot and two Copilots, and one training step of each on a given batch."""

    def __init__(self, arguments: argparse.Namespace, path: Path) -> None:
        self.device = arguments.device
        pilot = load_pilot(path, dtype=DTYPES[arguments.dtype], random_weights=bool(arguments.hidden))
        pilot.config.use_cache = False
        self.shape = pilot.config
        fields = {name: yaml.safe_load(value) for name, _, value in (f.partition("=") for f in arguments.copilot)}
        self.config = recipe_config(
            self.shape.num_hidden_layers,
            pilot={"dtype": arguments.dtype, "method": arguments.method},
            copilot={"dtype": arguments.dtype, **fields},
        )
        layers = choose_layers(None, self.config.copilot.every, self.shape.num_hidden_layers)
        self.learners: dict[str, Learner] = {}
        self.target_ids = min(arguments.target_ids, self.shape.vocab_size)
        for output, ids in (("targets", torch.arange(self.target_ids)), ("V", None)):
            copilot = Copilot.from_decoder(
                path,
                layers,
                pilot=pilot,
                output_ids=ids,
                random_weights=bool(arguments.hidden),
                **self.config.copilot.form(),
            )
            self.learners[output] = Learner(copilot, self.config.copilot, total_steps=1000, device=self.device)
        self.copilot_layers = len(layers)
        step = PilotStep(add_adapters(pilot, self.config.pilot), top_k=TOP_K)
        self.pilot = step.to(self.device).train()
        self.trained = [p for p in self.pilot.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.config.pilot.learning_rate)

    def pilot_step(self, batch: Batch) -> CopilotBatch:
        """Forward with record, backward, clipping, optimizer."""
        inputs = [x.to(self.device) for x in batch.tensors()]
        self.optimizer.zero_grad()
        loss, record = self.pilot(*inputs, 1.0 / batch.target_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.pilot.max_grad_norm)
        self.optimizer.step()
        return CopilotBatch.from_step(record, *inputs, positions=self.config.log.positions)

    def copilot_step(self, output: str, form: str, batch: CopilotBatch) -> None:
        """`Learner.step` with the loss in the given form."""
        learner = self.learners[output]
        learner.loss = learner.batch_sums.loss = make_loss(form)
        learner.step(batch)

    def clear(self) -> None:
        """Drop all gradients: each measured step makes its own."""
        self.optimizer.zero_grad()
        for learner in self.learners.values():
            learner.optimizer.zero_grad()


def steps(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Rounds of a Pilot step and the Copilots' steps on its record; then the memory of one step each."""
    made = Steps(arguments, path)
    variants = [(output, form) for output in made.learners for form in FORMS]
    seconds: dict[str, list[float]] = {"Pilot": [], **{f"{o} {f}": [] for o, f in variants}}
    parts: dict[str, list[float]] = {}
    targets = 0
    for number in range(WARM_UP_ROUNDS + arguments.rounds):
        batch = make_batch(
            number,
            batch_size=arguments.batch_size,
            tokens=arguments.tokens,
            targets=arguments.targets,
            vocab_size=made.shape.vocab_size,
            target_ids=made.target_ids,
        )
        pilot_seconds, errors = timed(partial(made.pilot_step, batch), arguments.device)
        found = {"Pilot": pilot_seconds}
        turn = number % len(variants)
        for output, form in variants[turn:] + variants[:turn]:
            found[f"{output} {form}"], _ = timed(partial(made.copilot_step, output, form, errors), arguments.device)
        learner, own = made.learners[OWN[0]], partial(made.copilot_step, OWN[0], OWN[1], errors)
        own_parts = parts_of_step(learner, own, arguments.device)
        if number >= WARM_UP_ROUNDS:
            targets += batch.target_tokens
            for name, took in found.items():
                seconds[name].append(took)
            for name, took in own_parts.items():
                parts.setdefault(name, []).append(took / pilot_seconds)
    made.clear()
    memory = {"Pilot": peak_bytes(partial(made.pilot_step, batch), arguments.device)}
    for output, form in variants:
        made.clear()
        memory[f"{output} {form}"] = peak_bytes(partial(made.copilot_step, output, form, errors), arguments.device)
    rows = {}
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["Pilot"], strict=True)]
        rows[name] = {
            "seconds": spread(taken),
            "seconds_per_target_token": sum(taken) / targets,
            "ratio_to_pilot": statistics.median(ratios),
            "peak_bytes": memory[name],
            "peak_bytes_per_target_token": memory[name] / batch.target_tokens,
            "memory_ratio_to_pilot": memory[name] / memory["Pilot"],
        }
    tokens = targets // arguments.rounds
    width = made.learners["V"].copilot.output.in_features
    return {
        "rows": rows,
        "parts": {name: spread(shares) for name, shares in parts.items()},
        "steps_per_round": arguments.steps_per_round,
        "target_tokens_per_step": tokens,
        "pilot": f"{made.shape.num_hidden_layers} layers of {made.shape.hidden_size}, V {made.shape.vocab_size}",
        "copilot_layers": made.copilot_layers,
        "copilot_method": made.config.copilot.method,
        "width": width,
        "vocab_size": made.shape.vocab_size,
        "outputs": {name: learner.copilot.output.out_features for name, learner in made.learners.items()},
    }


class LossAlone:
    """The loss of random states and errors, and both its gradients."""

    def __init__(self, arguments: argparse.Namespace, weight: torch.Tensor, tokens: int) -> None:
        outputs, width = weight.shape
        device, listed = arguments.device, TOP_K + 1
        self.device, self.bf16, self.weight = device, arguments.dtype == "bf16", weight
        self.states = torch.randn(tokens, width, device=device, requires_grad=True)
        self.places = torch.randint(0, outputs, (tokens, listed), device=device)
        self.values = 0.1 * torch.rand(tokens, listed, device=device)

    def run(self, form: str) -> None:
        """Forward and backward in the given form."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            total = make_loss(form).total(self.states, self.weight, self.places, self.values)
        total.backward()

    def clear(self) -> None:
        """Drop the gradients."""
        self.weight.grad = self.states.grad = None


def loss_alone(arguments: argparse.Namespace, width: int, outputs: int) -> list[dict[str, Any]]:
    """Seconds and peak bytes of the loss and both its gradients, by token count and form, interleaved."""
    weight = (0.01 * torch.randn(outputs, width, device=arguments.device)).requires_grad_()
    rows = []
    for share in SWEEP_WIDTHS:
        tokens = max(1, round(share * width))
        alone = LossAlone(arguments, weight, tokens)
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        for number in range(WARM_UP_ROUNDS + SWEEP_ROUNDS):
            for form in FORMS[number % len(FORMS) :] + FORMS[: number % len(FORMS)]:
                alone.clear()
                taken, _ = timed(partial(alone.run, form), arguments.device)
                if number >= WARM_UP_ROUNDS:
                    seconds[form].append(taken)
        memory = {}
        for form in FORMS:
            alone.clear()
            memory[form] = peak_bytes(partial(alone.run, form), arguments.device)
        rows.append(
            {
                "tokens": tokens,
                "seconds": {form: spread(taken) for form, taken in seconds.items()},
                "peak_bytes": memory,
                "blocks_to_autograd": statistics.median(
                    b / a for b, a in zip(seconds["blocks"], seconds["autograd"], strict=True)
                ),
            }
        )
    return rows


def print_steps(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The table of the steps."""
    rows = []
    for name, row in result["rows"].items():
        output, _, form = name.partition(" ")
        label = name
        if form:
            label = f"Copilot, A = {result['outputs'][output]}, {form}"
        rows.append(
            [
                label,
                f"{1000 * row['seconds']['median']:.1f}",
                f"{1000 * row['seconds_per_target_token']:.3f}",
                f"{row['ratio_to_pilot']:.3f}",
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['peak_bytes_per_target_token'] / 1e3:.1f}",
                f"{row['memory_ratio_to_pilot']:.3f}",
            ]
        )
    print_table(
        f"training steps in {arguments.dtype}, {arguments.batch_size} x {arguments.tokens} tokens of which "
        f"{arguments.targets} are targets; Pilot of {result['pilot']}, {arguments.method}; "
        f"Copilot of {result['copilot_layers']} layers, {result['copilot_method']}",
        ["", "ms a step", "ms a target", "/ Pilot", "peak MB", "kB a target", "/ Pilot"],
        rows,
    )
    count, whole = result["steps_per_round"], result["rows"][" ".join(OWN)]["ratio_to_pilot"]
    print_table(
        f"a step of a run's own form, against the Pilot's round: {whole:.3f}, and {count * whole:.3f} for {count} steps per round",
        [*result["parts"]],
        [[f"{shares['median']:.4f}" for shares in result["parts"].values()]],
    )


def print_alone(rows: list[dict[str, Any]], width: int, outputs: int, dtype: str) -> None:
    """The table of the loss alone."""
    print_table(
        f"loss and gradients alone in {dtype}, A = {outputs}, d = {width}: ms and peak MB",
        ["tokens", *(f"{form} ms" for form in FORMS), "blocks / autograd", *(f"{form} MB" for form in FORMS)],
        [
            [
                str(row["tokens"]),
                *(f"{1000 * row['seconds'][form]['median']:.1f}" for form in FORMS),
                f"{row['blocks_to_autograd']:.2f}",
                *(f"{row['peak_bytes'][form] / 1e6:.0f}" for form in FORMS),
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="rounds measured (default 8)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shapes", choices=SHAPES, default="svamp", help="recipe that the next four are taken from")
    parser.add_argument("--tokens", type=int, help="mean tokens a sequence")
    parser.add_argument("--targets", type=int, help="completion tokens a sequence")
    parser.add_argument("--target-ids", type=int, help="different tokens in completions")
    parser.add_argument("--steps-per-round", type=int, help="Copilot steps for each round of the Pilot")
    parser.add_argument("--model", default=BUILTIN, help="model folder, or the builtin name; with --hidden: not read")
    parser.add_argument("--hidden", type=int, help="width of a Llama with random weights to measure instead")
    parser.add_argument("--layers", type=int, default=6, help="its layers")
    parser.add_argument("--vocab", type=int, default=32000, help="its vocabulary")
    parser.add_argument(
        "--copilot",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="of the section copilot, e.g. every=10 method=lora",
    )
    parser.add_argument("--method", choices=("lora", "full"), default="lora", help="how the Pilot is trained")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    for name, value in SHAPES[arguments.shapes].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-") as scratch:
        path = Path(scratch) if arguments.hidden else model_folder(arguments.model)
        if arguments.hidden:
            write_llama(path, arguments.hidden, arguments.layers, arguments.vocab)
        trained = steps(arguments, path)
    alone = loss_alone(arguments, trained["width"], trained["vocab_size"])
    result: dict[str, Any] = {
        "machine": device_line(arguments.device),
        "model": f"random Llama, width {arguments.hidden}" if arguments.hidden else arguments.model,
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "json"},
        "training": trained,
        "loss_alone": alone,
    }
    print(result["machine"])
    print_steps(trained, arguments)
    print_alone(alone, trained["width"], trained["vocab_size"], arguments.dtype)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
