"""Peak memory of the processes of a run, part by part, beside what `--plan` predicts and what an older checkout takes.

python jobs/benchmarks/memory.py [--against OLDER_CHECKOUT] [--hidden 1024 --layers 24 --vocab 32000] [--json FILE]

A Llama of random weights (bf16, as on the hub) is made in a temporary folder; each part then runs in fresh processes:

    learner        a Copilot learner is made from the Pilot's folder, and takes three steps
    pilot          a Pilot worker: LoRA, ZeRO stage 1, three rounds
    full           the same with all weights trained
    export         rank 0 writes the trained Pilot, adapters merged (above what its engine holds)
    zero3          two ranks make a ZeRO-3 engine with LoRA (the larger of the two)

`peak` is the largest resident memory (VmHWM), `own` the part that is no map of a file (RssAnon, sampled every 5 ms): pages of
mapped files are the system's to take back. Both are of the part alone for `export`. CPUs only; needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if "TC_RAY_CHECKOUT" not in os.environ:
    for folder in (ROOT, Path(__file__).resolve().parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))

PARTS = ("learner", "pilot", "full", "export", "zero3")
STEPS = 3


def status(name: str) -> int:
    """Bytes of a field of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}: this benchmark needs Linux")


class Watch:
    """Peaks between two moments of this process."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self.began = status("VmRSS")
        self._own = [status("RssAnon")]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self._own.append(max(self._own[-1], status("RssAnon")))

    def stop(self) -> dict[str, int]:
        """Bytes: peak, own, and what was resident at the start."""
        self._done.set()
        self._thread.join()
        return {"peak": status("VmHWM"), "own": max(self._own), "began": self.began, "own_began": self._own[0]}


def make_model(folder: Path, arguments: argparse.Namespace) -> None:
    """A Llama of random weights in bf16, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    heads = max(1, arguments.hidden // 64)
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    words = {"<pad>": 0, "<eos>": 1, "a": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def config_of(model: Path, part: str, tokens: int, rounds: Path) -> Any:
    """Settings of a run with this Pilot."""
    from tc_ray.config.schema import RunConfig

    pilot = {
        "method": "full" if part == "full" else "lora",
        "dtype": "bf16",
        "batch_size": 2,
        "micro_batch_size": 1,
        "zero_stage": 3 if part == "zero3" else 1,
    }
    return RunConfig.model_validate(
        {
            "run": {"folder": str(rounds)},
            "model": {"pilot": str(model)},
            "data": {"cutoff_tokens": tokens},
            "pilot": pilot,
            "copilot": {"every": 4, "batch_size": 4, "buffer_rounds": 1},
            "resources": {"pilot_workers": 2 if part == "zero3" else 1, "pilot_threads": 2, "copilot_threads": 2},
        }
    )


def meet(folder: Path, rank: int, ranks: int) -> None:
    """Form the process group of one machine."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks)


def learner(config: Any, model: Path, tokens: int) -> dict[str, int]:
    """Make a learner, and take steps on random records."""
    import torch

    from tc_ray.copilot.learner import make_learner
    from tc_ray.models.copilot import CopilotBatch
    from tc_ray.models.pilot.step import SparseErrors, StepRecord

    watch = Watch()
    made = make_learner(config, model, model, None, total_steps=STEPS)
    loaded = watch.stop()
    count, targets = config.copilot.batch_size, tokens // 4
    width, vocab = made.copilot.config.pilot_hidden_size, made.copilot.config.vocab_size
    for _ in range(STEPS):
        ids = torch.randint(vocab, (count, tokens))
        errors = SparseErrors(
            torch.randint(vocab, (count * targets, 17)),
            0.01 * torch.randn(count * targets, 17),
            torch.zeros(count * targets),
        )
        record = StepRecord(errors, torch.randn(count, tokens, width), torch.zeros(1), torch.zeros(1, dtype=torch.bool))
        lengths = torch.full((count,), tokens)
        made.step(CopilotBatch.from_step(record, ids, lengths, lengths - targets, positions="all"))
    return loaded | {"steps": status("VmHWM")}


def pilot(config: Any, model: Path, tokens: int) -> dict[str, int]:
    """An engine of one rank, and rounds on rows of the longest length."""
    import torch

    from tc_ray.pilot.engine import build_engine, take_step

    watch = Watch()
    engine = build_engine(config, model, rounds=STEPS)
    ids = torch.randint(100, (1, tokens))
    for _ in range(STEPS):
        for last in (False, True):
            loss, _ = engine(ids, torch.tensor([tokens]), torch.tensor([1]), 1.0 / tokens)
            engine.backward(loss)
            if not last:
                engine.step()
        take_step(engine, True)
    return watch.stop()


def export(config: Any, model: Path, folder: Path) -> dict[str, int]:
    """`save_merged` of an engine of one rank."""
    import numpy as np
    import torch

    from tc_ray.pilot.engine import build_engine
    from tc_ray.pilot.export import save_merged

    engine = build_engine(config, model, rounds=STEPS)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    row = {"input_ids": np.array([[2, 2, 2, 2]]), "lengths": np.array([4]), "target_start": np.array([2])}
    watch = Watch()
    save_merged(engine, config, model, folder / "final", probe=[row], rank=0)
    return watch.stop()


def child(arguments: argparse.Namespace) -> None:
    """One process of a part; prints its figures as JSON."""
    part, model, folder = arguments.part, arguments.model, arguments.folder
    config = config_of(model, part, arguments.tokens, folder / "run")
    if part == "learner":
        found = learner(config, model, arguments.tokens)
    else:
        meet(folder, arguments.rank, arguments.ranks)
        if part == "export":
            found = export(config, model, folder)
        elif part == "zero3":
            from tc_ray.pilot.engine import build_engine

            watch = Watch()
            build_engine(config, model, rounds=STEPS)
            found = watch.stop()
        else:
            found = pilot(config, model, arguments.tokens)
    print(f"\nFIGURES {json.dumps(found)}", flush=True)
    os._exit(0)  # process groups and threads of the libraries may wait for each other


def measure(part: str, model: Path, arguments: argparse.Namespace, checkout: Path) -> dict[str, int]:
    """The larger figures of the ranks of a part, run with the code of a checkout."""
    ranks = 2 if part == "zero3" else 1
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-", dir=arguments.folder) as folder:
        command = [sys.executable, __file__, "--part", part, "--model", str(model), "--folder", folder]
        command += ["--tokens", str(arguments.tokens), "--ranks", str(ranks)]
        paths = os.pathsep.join([str(checkout), str(Path(__file__).parent)])
        environment = {**os.environ, "PYTHONPATH": paths, "TC_RAY_CHECKOUT": str(checkout), "HF_HUB_OFFLINE": "1"}
        processes = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        found = []
        for process in processes:
            printed, _ = process.communicate(timeout=1800)
            lines = [line for line in printed.splitlines() if line.startswith("FIGURES ")]
            if not lines:
                raise SystemExit(f"{part} in {checkout} ended with code {process.returncode}")
            found.append(json.loads(lines[-1].removeprefix("FIGURES ")))
    return {name: max(figures[name] for figures in found) for name in found[0]}


def predicted(part: str, model: Path, arguments: argparse.Namespace) -> int | None:
    """What the plan says that the process takes beside the program itself, in bytes."""
    from transformers import AutoConfig

    from tc_ray.run.plan.memory import PROGRAM, pilot_worker
    from tc_ray.run.plan.memory import learner as planned_learner
    from tc_ray.run.plan.model_sizes import ModelConfig, model_sizes

    if part not in ("learner", "pilot", "full"):
        return None
    config = config_of(model, part, arguments.tokens, arguments.model)
    config.copilot.output_tokens = "all"
    found = ModelConfig(model, True, AutoConfig.from_pretrained(model))
    sizes = model_sizes(config, found, found, None)
    made = (
        planned_learner(config, sizes, round_bytes=0, rounds=1)
        if part == "learner"
        else pilot_worker(config, sizes, round_bytes=0)
    )
    return made.kept + made.passing - PROGRAM


def main() -> None:
    """Parse the arguments, run every part, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, by commas")
    parser.add_argument("--against", type=Path, help="an older checkout to compare with")
    parser.add_argument("--folder", type=Path, help="where temporary folders are made")
    parser.add_argument("--json", type=Path)
    for name, kind in (("part", str), ("model", Path), ("rank", int), ("ranks", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        child(arguments)
        return
    from workload import machine, print_table, write_json

    result: dict[str, Any] = {"machine": machine(), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-", dir=arguments.folder) as folder:
        arguments.model = Path(folder) / "model"
        make_model(arguments.model, arguments)
        result["weights"] = sum(file.stat().st_size for file in arguments.model.glob("*.safetensors"))
        for part in arguments.parts.split(","):
            began = time.monotonic()
            figures: dict[str, Any] = {"now": measure(part, arguments.model, arguments, ROOT)}
            if arguments.against:
                figures["older"] = measure(part, arguments.model, arguments, arguments.against.absolute())
            figures |= {"predicted": predicted(part, arguments.model, arguments), "seconds": time.monotonic() - began}
            result["parts"][part] = figures
    print(result["machine"])
    rows = []
    for part, figures in result["parts"].items():
        now, older, said = figures["now"], figures.get("older"), figures["predicted"]
        row = [part]
        for name, start in (("peak", "began"), ("own", "own_began")):
            taken = now[name] - now[start]
            row.append(f"{taken / 1e6:.0f}")
            row.append(f"{taken / (older[name] - older[start]):.2f}" if older else "")
        reached = now.get("steps", now["peak"]) - now["began"]
        rows.append([*row, f"{said / reached:.2f}" if said else ""])
    head = ["MB above the start", "peak", "to older", "own", "to older", "predicted / measured"]
    print_table(f"model of {result['weights'] / 1e6:.0f} MB", head, rows)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
