"""What a smaller Mistake Log costs the Copilot: one log, rewritten in other forms, a Copilot trained from each of them.

tc-ray train demo log.top_k=64 run.folder=RUN                     # or any run that logged all positions in bf16
python jobs/benchmarks/log_forms.py RUN [--forms ...] [--seeds 17 18 19] [--test-rounds 12] [--json FILE] [KEY=VALUE ...]

Forms: as-it-is; top-k=N, the N largest errors per token; positions=target, states of target tokens alone; states=int8. Several
are joined by a comma. Each is what the run would have logged with that setting, since the log does not change the Pilot.
Copilots are trained on all rounds but the last `--test-rounds`, by `tc-ray train-copilot`'s function with the run's settings (and
KEY=VALUE). Each is tested on the records of those last rounds whose samples the Pilot had not seen before, with their errors and
bf16 states as the run logged them, of the form's positions: the error ratio E||l - lambda f||^2 / E||l||^2 at the best lambda of
fusion.lam_grid, below 1 where the correction helps. Paired by seed, and by record: a bootstrap over the test records gives
the interval of the difference from the first form, of the seeds' mean. Needs no Ray.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from workload import machine, print_table, write_json

from tc_ray.config.load import load_saved_config
from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.copilot.batch import batch_from_records
from tc_ray.copilot.from_log import train_from_log
from tc_ray.copilot.learner import BatchSums
from tc_ray.inspection.source import find_log
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import flat_index, lengths_of
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.models.copilot import Copilot
from tc_ray.models.losses import LOSSES

FORMS = ("as-it-is", "top-k=16", "positions=target", "states=int8", "top-k=16,positions=target,states=int8")
DRAWS = 2000


def with_top_k(records: Records, count: int) -> Records:
    """The true token and the `count` largest others; the probability of those left out goes to the rest."""
    rest = records.error_rest - records.error_values[:, count + 1 :].sum(1)
    return replace(
        records,
        error_ids=records.error_ids[:, : count + 1],
        error_values=records.error_values[:, : count + 1],
        error_rest=rest.astype(np.float32),
    )


def of_targets(records: Records) -> Records:
    """States of the positions that predict a target token: the last of each record."""
    counts = lengths_of(records.target_offsets)
    kept = flat_index(records.rationale_offsets[1:] - counts, counts)
    return replace(records, rationale=records.rationale[kept], rationale_offsets=records.target_offsets)


def in_form(records: Records, form: str) -> Records:
    """The records as a run with that setting logs them."""
    for part in form.split(","):
        name, _, value = part.partition("=")
        if name == "top-k":
            records = with_top_k(records, int(value))
        elif part == "positions=target":
            records = of_targets(records)
        elif part == "states=int8":
            records = replace(records, rationale_dtype="int8")
        elif part != "as-it-is":
            raise SystemExit(f"--forms: unknown form {part!r}")
    return records


def write_form(rounds: Sequence[Records], form: str, metadata: LogMetadata, folder: Path) -> int:
    """A log of these rounds; the bytes of its files."""
    settings = LogSection(flush_rounds=8)
    first = in_form(rounds[0], form)
    described = replace(
        metadata,
        top_k=first.top_k,
        positions="target" if "positions=target" in form else metadata.positions,
        rationale_dtype=first.rationale_dtype,
    )
    ledger = Ledger(LogStore.create(folder, described).location, writers=1, run=metadata.run)
    attempt = ledger.begin_attempt(0, 1)
    writer = RecordWriter(folder, ledger.commit, settings, run=metadata.run, rank=0, attempt=attempt)
    for number, records in enumerate(rounds, 1):
        count = len(records)
        one: dict[str, Any] = {"rank": np.zeros(count, np.int32), "attempt": np.full(count, attempt, np.int32)}
        one["round"] = np.full(count, number, np.int64)
        writer.put(in_form(replace(records, **one), form), number)
        writer.end_round(number)
    writer.close()
    return ledger.state().bytes


def products(folder: Path, test: Records, form: str) -> np.ndarray:
    """[records, 3]: l.l, l.f and f.f of each test record, for the Copilot in `folder`."""
    copilot = Copilot.from_pretrained(folder).eval()
    sums = BatchSums(copilot, LOSSES["rmse"](copilot.config.vocab_size), bf16=False)
    shown = of_targets(test) if "positions=target" in form else test
    with torch.no_grad():
        found = [sums.products(batch_from_records(shown, [row])).tolist() for row in range(len(shown))]
    return np.array(found)


def best_ratio(sums: np.ndarray, grid: Sequence[float]) -> np.ndarray:
    """Least error ratio over the lambdas, of sums [..., 3]."""
    errors, across, squares = np.moveaxis(sums, -1, 0)
    return np.min([1 + lam * (lam * squares - 2 * across) / errors for lam in grid], axis=0)


def intervals(found: dict[str, np.ndarray], grid: Sequence[float]) -> dict[str, list[float]]:
    """95% interval of each form's mean ratio less that of the first form; found: [seeds, records, 3]."""
    count = next(iter(found.values())).shape[1]
    chosen = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    drawn = {form: best_ratio(sums[:, chosen].sum(2), grid).mean(0) for form, sums in found.items()}
    base = next(iter(drawn.values()))
    return {form: [float(np.quantile(means - base, q)) for q in (0.025, 0.975)] for form, means in drawn.items()}


def measure(arguments: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Write the forms, train, test."""
    with MistakeLog(find_log(str(arguments.run)).uri) as log:
        metadata, records = log.metadata, log.records()
    if metadata.positions != "all" or metadata.rationale_dtype != "bf16" or metadata.error != "top-k":
        raise SystemExit(f"{arguments.run}: this needs a log of all positions in bf16, with log.error top-k")
    numbers = np.unique(records.round)
    if len(numbers) <= arguments.test_rounds:
        raise SystemExit(f"{arguments.run}: {len(numbers)} rounds; --test-rounds must be less")
    rounds = [records.select(np.flatnonzero(records.round == number)) for number in numbers]
    test = Records.concat(rounds[-arguments.test_rounds :])
    test = test.select(np.flatnonzero((test.seen == 0) & (lengths_of(test.target_offsets) > 0)))
    grid = sorted(set(config.fusion.lam_grid))
    found: dict[str, np.ndarray] = {}
    result: dict[str, Any] = {"machine": machine(), "test_records": len(test), "forms": {}}
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-", dir=arguments.folder) as name:
        for form in arguments.forms:
            place = Path(name) / f"log-{form}"
            size = write_form(rounds[: -arguments.test_rounds], form, metadata, place)
            sums = []
            for seed in arguments.seeds:
                settings = config.model_copy(deep=True)
                settings.run.seed = seed
                with MistakeLog(place) as log:
                    trained = train_from_log(log, settings, Path(name) / f"copilot-{form}-{seed}")
                sums.append(products(trained.folder, test, form))
                print(f"{form}, seed {seed}: {best_ratio(sums[-1].sum(0), grid):.4f}", file=sys.stderr, flush=True)
            found[form] = np.array(sums)
            rows = sum(len(one) for one in rounds[: -arguments.test_rounds])
            result["forms"][form] = {
                "bytes_per_row": size / rows,
                "error_ratio": best_ratio(found[form].sum(1), grid).tolist(),
            }
    for form, interval in intervals(found, grid).items():
        result["forms"][form]["difference_interval"] = interval
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that has ended")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings of the Copilot, e.g. copilot.every=10"
    )
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help="the others are compared with the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--test-rounds", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="for logs and Copilots (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_intermixed_args()
    config = load_saved_config(arguments.run / "config.yaml", arguments.overrides)
    result = measure(arguments, config)
    print(result["machine"])
    base = next(iter(result["forms"].values()))
    rows = [
        [
            form,
            f"{row['bytes_per_row']:.0f}",
            f"{row['bytes_per_row'] / base['bytes_per_row']:.3f}",
            " ".join(f"{ratio:.4f}" for ratio in row["error_ratio"]),
            f"{np.mean(row['error_ratio']) - np.mean(base['error_ratio']):+.4f}",
            "{:+.4f} to {:+.4f}".format(*row["difference_interval"]),
        ]
        for form, row in result["forms"].items()
    ]
    title = f"{result['test_records']} test records, seeds {' '.join(map(str, arguments.seeds))}"
    print_table(title, ["form", "bytes/row", "of the first", "error ratio", "difference", "95% interval"], rows)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
