"""Throughput and time to the first token of the engine under streaming clients, Pilot alone against fused.

python jobs/benchmarks/serving.py [--clients 1 8 32 64] [--burst 32] [--long-prompt 100000] [--seconds 20] [--json FILE]

Each of N clients sends one request after the other (prompts and answers of unlike lengths, the same in every row, no end
token) and takes its tokens as they come. Rows: the engine with the Pilot alone (lambda 0) and fused, N clients each, in turn;
and, for N of `--against`, what a server without continuous batching does with the same requests: one `generate` after the
other (`one by one`), and batches of N that begin and end together (`static`), whose clients wait for the longest answer.
`bound`: the fused engine cannot be faster than Pilot bytes / (Pilot + Copilot bytes) of the Pilot's, as every weight is read
once a step. HTTP and Ray are left out. `--burst`: so many requests at once. `--long-prompt`: the gaps between the tokens of N
clients alone, and while a prompt of so many tokens is computed. `--export FOLDER` writes the model for `tc-ray serve`, and ends.
"""

from __future__ import annotations

import argparse
import functools
import queue
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from decoding import copilot_bytes, pilot_bytes
from fused_models import add_model_options, device_line, load_models
from transformers import AutoTokenizer
from workload import BUILTIN, model_folder, print_table, write_json

from tc_ray.config.serving import ServingSection
from tc_ray.models.fusion import FusedModel
from tc_ray.serving.engine.contract import Event, Finished, GenerationRequest, Piece
from tc_ray.serving.engine.engine import Engine

LAM = 0.5


@dataclass
class Figures:
    """What a row measured."""

    tokens: int = 0
    requests: int = 0
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)

    def told(self) -> dict[str, float]:
        """As numbers for the table."""
        first = sorted(self.first_token_s)
        if not first:
            raise SystemExit(
                f"no request got its first token within {self.seconds:.0f} s: give --seconds a larger number"
            )
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "requests": float(self.requests),
            "first_token_median_s": statistics.median(first),
            "first_token_p95_s": first[int(0.95 * len(first))],
            "between_tokens_median_s": statistics.median(self.between_s) if self.between_s else 0.0,
        }


class NoEnd:
    """The engine's tokenizer here: text costs are part of serving, end tokens are not part of this measurement."""

    eos_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int], **_: Any) -> str:
        """A word a token."""
        return "".join(f" {token}" for token in ids)


def requests(arguments: argparse.Namespace, vocab: int, lam: float) -> Iterator[GenerationRequest]:
    """The same endless series for every row."""
    dice = random.Random(5)
    while True:
        prompt = dice.randint(arguments.prompt // 2, arguments.prompt * 3 // 2)
        new = dice.randint(arguments.new_tokens // 2, arguments.new_tokens * 3 // 2)
        yield GenerationRequest(tuple(dice.randrange(2, vocab) for _ in range(prompt)), new, lam=lam)


def stamped(events: queue.Queue[Any]) -> Callable[[int, Event], None]:
    """Puts each event there, with the time it came at."""
    return lambda _, event: events.put((time.perf_counter(), event))


def continuous(
    model: FusedModel, lam: float, clients: int, arguments: argparse.Namespace, long_prompt: int = 0
) -> Figures:
    """N clients at the engine for `--seconds`, after a warm-up; requests begun before the end count to their end.

    long_prompt: tokens of one more prompt, which is computed from the beginning of the warm-up on.
    """
    limits = ServingSection(max_running=clients, max_waiting=clients, prefix_bytes=0)
    if long_prompt:
        limits = limits.model_copy(update={"max_running": clients + 1, "cache_bytes": 2**40})
    engine = Engine(model, NoEnd(), limits)
    if long_prompt:
        long = GenerationRequest(tuple(i % 1000 for i in range(long_prompt)), 1, lam=lam)
        [handle] = engine.submit([long], lambda *_: None)
    series, lock, figures = requests(arguments, model.vocab_size, lam), threading.Lock(), Figures()
    begin = time.perf_counter() + arguments.warm_up
    end = begin + arguments.seconds

    def client() -> None:
        while time.perf_counter() < end:
            with lock:
                request = next(series)
            events: queue.Queue[Any] = queue.Queue()
            sent = last = time.perf_counter()
            engine.submit([request], stamped(events))
            first = None
            while not isinstance((item := events.get())[1], Finished):
                now, event = item
                if not isinstance(event, Piece):
                    raise SystemExit(f"a generation failed: {event}")
                with lock:
                    if begin <= now < end:
                        figures.tokens += 1
                        if first is not None:
                            figures.between_s.append(now - last)
                        elif sent >= begin:
                            figures.first_token_s.append(now - sent)
                first, last = first or now, now
            with lock:
                figures.requests += begin <= last < end

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if long_prompt:
        print(
            f"  of the long prompt {engine.load().prompt_tokens} tokens and those of the others are computed",
            flush=True,
        )
        handle.cancel()
    engine.close()
    figures.seconds = arguments.seconds
    return figures


def burst(model: FusedModel, lam: float, count: int, arguments: argparse.Namespace) -> list[float]:
    """Seconds to the first token of each of `count` requests that come at once."""
    engine = Engine(model, NoEnd(), ServingSection(max_running=count, prefix_bytes=0, cache_bytes=2**40))
    series, events = requests(arguments, model.vocab_size, lam), queue.Queue[Any]()
    found: dict[int, float] = {}
    began = time.perf_counter()
    given = [next(series) for _ in range(count)]
    engine.submit(given, lambda number, event: events.put((time.perf_counter(), number, event)))
    while len(found) < count:
        now, number, event = events.get()
        if not isinstance(event, Piece):
            raise SystemExit(f"a generation failed: {event}")
        found.setdefault(number, now - began)
    engine.close()
    return sorted(found.values())


def measure_delays(model: FusedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--burst` and `--long-prompt` ask for, `--repeats` times."""
    found: dict[str, Any] = {"burst": [], "long_prompt": {}}
    for _ in range(arguments.repeats if arguments.burst else 0):
        runs = {name: burst(model, lam, arguments.burst, arguments) for name, lam in (("Pilot", 0.0), ("fused", LAM))}
        found["burst"].append(runs)
        for name, first in runs.items():
            print(
                f"  {arguments.burst} at once, {name}: first token {statistics.median(first):.2f} s (median), {first[-1]:.2f} s"
            )
    for clients in arguments.clients if arguments.long_prompt else ():
        gaps = [
            sorted(continuous(model, LAM, clients, arguments, tokens).between_s)
            for tokens in (0, arguments.long_prompt)
        ]
        rows = [(statistics.median(one), one[int(0.99 * len(one))], one[-1]) for one in gaps]
        found["long_prompt"][clients] = rows
        shown = "; ".join(f"{a:.3f}, {b:.3f}, {c:.3f} s" for a, b, c in rows)
        print(
            f"  {clients} clients, gaps between tokens (median, 99%, longest) alone; beside a long prompt: {shown}",
            flush=True,
        )
    return found


@torch.inference_mode()
def in_batches(model: FusedModel, lam: float, size: int, arguments: argparse.Namespace) -> Figures:
    """`generate` on `size` waiting requests at a time, padded on the left, until the longest has ended; then the next ones."""
    series, figures = requests(arguments, model.vocab_size, lam), Figures()
    began = time.perf_counter()
    while figures.seconds < arguments.seconds:
        batch = [next(series) for _ in range(size)]
        width, longest = max(len(r.prompt_ids) for r in batch), max(r.max_new_tokens for r in batch)
        ids = torch.zeros(size, width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        sent = time.perf_counter()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            lam=lam,
        )
        figures.first_token_s += [time.perf_counter() - sent] * size  # nothing is streamed
        figures.tokens += sum(request.max_new_tokens for request in batch)
        figures.requests += size
        figures.seconds = time.perf_counter() - began
    return figures


def measure(model: FusedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, `--repeats` times in turn; the median run of each by throughput."""
    rows: dict[str, Callable[[], Figures]] = {}
    for clients in arguments.clients:
        for name, lam in (("Pilot", 0.0), ("fused", LAM)):
            rows[f"{clients} clients, {name}"] = functools.partial(continuous, model, lam, clients, arguments)
    rows["one by one, fused"] = lambda: in_batches(model, LAM, 1, arguments)
    for size in arguments.against:
        rows[f"static batches of {size}, fused"] = functools.partial(in_batches, model, LAM, size, arguments)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for repeat in range(arguments.repeats):
        for name in rows if repeat % 2 == 0 else reversed(rows):
            runs[name].append(rows[name]().told())
            print(f"  {repeat + 1}: {name}: {runs[name][-1]['tokens_per_second']:.1f} tokens/s", flush=True)
    read = pilot_bytes(model), copilot_bytes(model)
    bound = read[0] / sum(read)

    def rates(name: str) -> list[float]:
        return [run["tokens_per_second"] for run in runs[name]]

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates(a), rates(b), strict=True))

    fused_to_pilot = {n: ratio(f"{n} clients, fused", f"{n} clients, Pilot") for n in arguments.clients}
    return {
        "machine": device_line(arguments.device),
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "json"},
        "bytes": read,
        "bound": bound,
        "runs": runs,
        "fused_to_pilot": fused_to_pilot,
        "of_bound": {n: found / bound for n, found in fused_to_pilot.items()},
        "to_one_by_one": {n: ratio(f"{n} clients, fused", "one by one, fused") for n in arguments.clients},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--against", type=int, nargs="*", default=[32], help="sizes of static batches")
    parser.add_argument("--prompt", type=int, default=80, help="mean prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=48, help="mean new tokens")
    parser.add_argument("--seconds", type=float, default=20, help="measured, of each row")
    parser.add_argument("--warm-up", type=float, default=5, help="seconds before that")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--burst", type=int, default=0, help="measure so many requests at once instead")
    parser.add_argument("--long-prompt", type=int, default=0, help="measure beside a prompt of so many tokens instead")
    parser.add_argument("--export", type=Path, help="write the model here and end")
    add_model_options(parser, BUILTIN)
    parser.set_defaults(dtype="fp32", threads=2)
    arguments = parser.parse_args()
    model = load_models(arguments)
    if arguments.export:
        model.default_lam = LAM
        model.save_pretrained(arguments.export)
        AutoTokenizer.from_pretrained(model_folder(arguments.model)).save_pretrained(arguments.export / "pilot")
        return
    model.generation_config.eos_token_id = None
    if arguments.burst or arguments.long_prompt:
        print(device_line(arguments.device))
        write_json(arguments.json, measure_delays(model, arguments))
        return
    result = measure(model, arguments)
    print(result["machine"])
    middle = {
        name: sorted(runs, key=lambda run: run["tokens_per_second"])[len(runs) // 2]
        for name, runs in result["runs"].items()
    }
    print_table(
        f"{arguments.dtype}, prompts of about {arguments.prompt}, answers of about {arguments.new_tokens} tokens, "
        f"median of {arguments.repeats} runs",
        ["", "tokens/s", "first token s", "p95", "between tokens s"],
        [
            [
                name,
                f"{run['tokens_per_second']:.1f}",
                f"{run['first_token_median_s']:.2f}",
                f"{run['first_token_p95_s']:.2f}",
                f"{run['between_tokens_median_s']:.3f}" if run["between_tokens_median_s"] else "",
            ]
            for name, run in middle.items()
        ],
    )
    print_table(
        f"fused / Pilot of the same run; bound {result['bound']:.3f}",
        ["clients", "fused / Pilot", "of the bound", "to one by one"],
        [
            [
                str(n),
                f"{result['fused_to_pilot'][n]:.3f}",
                f"{result['of_bound'][n]:.3f}",
                f"{result['to_one_by_one'][n]:.2f}",
            ]
            for n in arguments.clients
        ],
    )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
