"""Wall clock of an evaluation: the whole grid decoded by `generate` in one process, against workers and two candidates.

python jobs/benchmarks/evaluation.py [--rows 500] [--validation 200] [--workers 2] [--new-tokens 16] [--dtype fp32]

Both choose lambda on the same validation rows and measure the same test rows with lambda 0 and another one. "one process" is
what tc-ray did before: every (space, lam) decoded with `generate`, as many threads as there are workers. Both load the models
themselves. Prompts are random ids and nothing ends early, so texts that end at unlike lengths gain more than is shown. Starts
a Ray of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fused_models import add_model_options, device_line, load_models
from workload import BUILTIN, make_batch, model_folder, print_table, write_json

from tc_ray.config.fusion import FusionSection
from tc_ray.evaluation.choose import Passes, choose_lambda, grid_of
from tc_ray.evaluation.pool import Pool
from tc_ray.evaluation.progress import Progress
from tc_ray.evaluation.rows import HeldOut, RowSet
from tc_ray.evaluation.sources import ModelSource, load_source
from tc_ray.evaluation.teacher_forced import Text, text_measures
from tc_ray.models.fusion import FusedModel

TARGETS = 12
"""Gold tokens of a row."""


def rows_of(count: int, tokens: int, vocab: int, number: int) -> RowSet:
    """Random rows of `tokens`, give or take a fifth."""
    batch = make_batch(number, batch_size=count, tokens=tokens, targets=TARGETS, vocab_size=vocab, target_ids=200)
    rows = []
    for at, (length, start) in enumerate(zip(batch.lengths, batch.target_start, strict=True)):
        rows.append(HeldOut(at, batch.input_ids[at, :length].tolist(), int(start), "none", ""))
    return RowSet("validation" if number else "test", "exact_match", rows, "random ids")


def one_process(
    source: ModelSource, fusion: FusionSection, validation: RowSet, test: RowSet, arguments: argparse.Namespace
) -> dict[str, float]:
    """Seconds of the older procedure, by part."""
    torch.set_num_threads(arguments.workers)
    began = time.perf_counter()
    model, tokenizer = load_source(source, fusion.feedback, "cpu")
    seconds = {"load": time.perf_counter() - began}
    grid = grid_of(fusion)

    def decode(rows: RowSet, choices: list[Any]) -> None:
        for space, lam in choices:
            model.space = space
            for batch in _batches(rows, fusion.eval_batch_size):
                prompts = [torch.tensor(row.prompt_ids) for row in batch]
                ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
                mask = torch.nn.utils.rnn.pad_sequence(
                    [torch.ones_like(one) for one in prompts], batch_first=True, padding_side="left"
                )
                model.generate(
                    ids, attention_mask=mask, lam=lam, max_new_tokens=fusion.max_new_tokens, do_sample=False,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
                )  # fmt: skip

    def timed(name: str, work: Any) -> None:
        began = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - began

    def forced(rows: RowSet, choices: list[Any]) -> None:
        texts = [Text(row.input_ids, row.target_start) for row in rows.rows]
        text_measures(model, texts, choices, batch_size=fusion.eval_batch_size)

    both = [grid[0], grid[-1]]
    timed("validation, teacher-forced", lambda: forced(validation, grid))
    timed("validation, decoded", lambda: decode(validation, grid))
    timed("test, teacher-forced", lambda: forced(test, both))
    timed("test, decoded", lambda: decode(test, both))
    return seconds


def _batches(rows: RowSet, size: int) -> list[list[HeldOut]]:
    ordered = sorted(rows.rows, key=lambda row: row.target_start)
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def workers(
    source: ModelSource, fusion: FusionSection, validation: RowSet, test: RowSet, folder: Path
) -> dict[str, float]:
    """Seconds of today's procedure, by part; the first worker's start and load are in the first."""
    seconds = {}
    grid = grid_of(fusion)
    with Progress() as progress, Pool(folder / "parts", progress, bundle={"CPU": 1.0}) as pool:
        passes = Passes(pool, source, fusion, fusion.feedback)
        began = time.perf_counter()
        choose_lambda(passes, validation)
        seconds["validation"] = time.perf_counter() - began
        began = time.perf_counter()
        passes.forced(test, [grid[0], grid[-1]])
        passes.said(test, [grid[0], grid[-1]])
        seconds["test"] = time.perf_counter() - began
    return seconds


def saved(fused: FusedModel, tokenizer_of: str, folder: Path) -> ModelSource:
    """The models in a folder, with the tokenizer of a model."""
    from transformers import AutoTokenizer

    fused.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder(tokenizer_of)).save_pretrained(folder / "pilot")
    dtype = "bf16" if fused.pilot.dtype == torch.bfloat16 else "fp32"
    return ModelSource("m", str(folder / "pilot"), str(folder / "copilot"), dtype, "benchmark")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500, help="validation and test rows together")
    parser.add_argument("--validation", type=int, default=200, help="validation rows among them")
    parser.add_argument("--tokens", type=int, default=92, help="tokens of a row, 12 of them gold")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens decoded per row")
    parser.add_argument("--workers", type=int, default=2, help="workers, and threads of the one process")
    add_model_options(parser, BUILTIN)
    arguments = parser.parse_args()
    import ray

    fused = load_models(arguments)
    fusion = FusionSection(space="choose", max_new_tokens=arguments.new_tokens)
    vocab = fused.vocab_size
    validation = rows_of(arguments.validation, arguments.tokens, vocab, 1)
    test = rows_of(arguments.rows - arguments.validation, arguments.tokens, vocab, 0)
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-") as name:
        source = saved(fused, arguments.model, Path(name) / "models")
        del fused
        ray.init(address="local", num_cpus=arguments.workers, include_dashboard=False, log_to_driver=False)
        new = workers(source, fusion, validation, test, Path(name))
        ray.shutdown()
        old = one_process(source, fusion, validation, test, arguments)
    totals = {"one process": sum(old.values()), "workers": sum(new.values())}
    ratio = totals["workers"] / totals["one process"]
    print(device_line("cpu"))
    print_table(
        f"{arguments.rows} rows of {arguments.tokens} tokens, {arguments.new_tokens} decoded, {len(grid_of(fusion))} candidates",
        ["procedure", "part", "seconds"],
        [
            *(["one process", part, f"{seconds:.1f}"] for part, seconds in old.items()),
            *(["workers", part, f"{seconds:.1f}"] for part, seconds in new.items()),
            *([name, "all", f"{seconds:.1f}"] for name, seconds in totals.items()),
        ],
    )
    print(f"workers / one process: {ratio:.2f}")
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
    result = {"settings": settings, "one process": old, "workers": new, "totals": totals, "ratio": ratio}
    write_json(arguments.json, cast(dict[str, Any], result | {"machine": device_line("cpu")}))


if __name__ == "__main__":
    main()
