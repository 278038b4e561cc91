"""`tc-ray eval` on a Ray of its own: several models and sets in one report, workers and drivers that die, changed inputs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tc_ray.evaluation.compare import POOLED
from tc_ray.evaluation.rows import RowResult, read_results, results_file
from tc_ray.evaluation.worker import EvaluationWorker
from tc_ray.models.fusion import FusedModel
from tc_ray.run.evaluate import Asked, evaluate_models
from tests.support.command_line import tc_ray
from tests.support.evaluation_samples import tiny_fused
from tests.support.local_ray import local_ray
from tests.support.tiny_model import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
ROWS = 40
LAM = 0.8

cluster = local_ray(cpus=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fused/: an exported model; plain/: its Pilot as an ordinary model; sums.jsonl and pick.jsonl."""
    folder = tmp_path_factory.mktemp("models")
    fused = tiny_fused(folder)
    fused.default_lam, fused.space = LAM, "logits"
    fused.save_pretrained(folder / "fused")
    fused.pilot.save_pretrained(folder / "plain")
    for place in ("fused/pilot", "plain"):
        make_tokenizer().save_pretrained(folder / place)
    sums = [{"prompt": f"{n} + {n * n}" + "?" * (n % 5), "completion": f"{n + n * n}"} for n in range(ROWS)]
    pick = [{"prompt": f"{n}?", "options": ["odd", "even", f"{n}"], "answer": n % 2 ^ 1} for n in range(12)]
    for name, rows in (("sums", sums), ("pick", pick)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def asked(folder: Path, out: Path, **more: Any) -> Asked:
    return Asked({"sums": str(folder / "sums.jsonl")}, out=out, **more)


def answers(out: Path, model: str) -> list[RowResult]:
    return read_results(results_file(out, model, "sums"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    evaluate_models([f"a={folder / 'fused'}"], asked(folder, out))
    return out


def test_models_and_sets_in_one_report(folder: Path, tmp_path: Path) -> None:
    """The command itself; each row's answer is what `generate` says to its prompt."""
    files = [f"--data={name}={folder / name}.jsonl" for name in ("sums", "pick")]
    done = tc_ray(
        "eval",
        f"a={folder / 'fused'}",
        f"base={folder / 'plain'}",
        *files,
        "--metric",
        "pick=choice",
        "--out",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["results"]) == ["a/pilot", "a", "base"]
    assert {name: line["metric"] for name, line in report["results"]["a"].items()} == {
        "sums": "exact_match",
        "pick": "choice",
    }
    pairs = {(pair["a"], pair["b"], pair["set"]) for pair in report["pairs"]}
    assert len(pairs) == 9 and ("a/pilot", "base", POOLED) in pairs
    assert report["sources"]["a"]["how"] == "as exported" and report["sources"]["a"]["lam"] == LAM
    same, other = answers(tmp_path, "a/pilot"), answers(tmp_path, "base")
    assert [row.said for row in same] == [row.said for row in other], "the Pilot and the plain model are the same"
    fused = FusedModel.from_pretrained(folder / "fused")
    tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
    for number, row in enumerate(answers(tmp_path, "a")[:6]):
        prompt = json.loads((folder / "sums.jsonl").read_text().splitlines()[number])["prompt"]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            out = fused.generate(ids, max_new_tokens=64, do_sample=False, lam=LAM)
        assert (row.row, row.said) == (number, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    for words in ("evaluate: a on sums", f"{ROWS} of {ROWS} rows", "a against its Pilot on sums", "report: "):
        assert words in done.stdout


def test_bad_words_are_refused(folder: Path, tmp_path: Path) -> None:
    fused, sums = f"a={folder / 'fused'}", f"sums={folder / 'sums.jsonl'}"
    for words, said in (
        ([fused, "--data", "sums"], "write NAME=VALUE"),
        ([fused, "--data", sums, "--metric", "sums=taste"], "exact_match, choice, ranking, nll, chrf, or a function"),
        ([fused, "--data", sums, "--metric", "other=nll"], "there is no set other; the sets are sums"),
        ([fused, fused, "--data", sums], "two models have one name"),
        ([fused], "give --data NAME=FILE"),
        ([fused, "--data", sums, "--choose-again"], "no validation rows"),
        ([fused, "--data", sums, "--metric", "sums=choice"], "row 0: metric choice: it has no `options`"),
        ([f"a={folder / 'nowhere'}", "--data", sums], "does not exist"),
    ):
        done = tc_ray("eval", *words, "--out", tmp_path / "out")
        text = re.sub(r"[│\s]+", " ", done.stdout + done.stderr)  # typer puts a box around its own errors
        assert done.returncode == 2 and said in text, (words, text)


def test_a_killed_worker_costs_its_batch_only(
    folder: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "died"

    class Dying(EvaluationWorker):
        def compute(self, job: Any, rows: Any, folder: Path) -> dict[int, Any]:
            if job.kind == "said" and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().compute(job, rows, folder)

    monkeypatch.setattr("tc_ray.evaluation.worker.EvaluationWorker", Dying)
    evaluate_models([f"a={folder / 'fused'}"], asked(folder, tmp_path / "out"))
    assert mark.exists() and "its batch goes to another one" in capfd.readouterr().out
    for model in ("a", "a/pilot"):
        assert answers(tmp_path / "out", model) == answers(undisturbed, model)


def test_workers_that_always_die_end_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(EvaluationWorker):
        def compute(self, job: Any, rows: Any, folder: Path) -> dict[int, Any]:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    monkeypatch.setattr("tc_ray.evaluation.worker.EvaluationWorker", Dead)
    monkeypatch.setattr("tc_ray.evaluation.pool.DEATHS", 0)
    done = tc_ray("eval", folder / "plain", "--data", f"sums={folder / 'sums.jsonl'}", "--out", tmp_path)
    assert done.returncode == 2 and "1 workers died over plain on sums" in done.stderr


@pytest.mark.slow
def test_the_benchmark_measures_both_procedures(folder: Path, tmp_path: Path) -> None:
    script = ROOT / "jobs" / "benchmarks" / "evaluation.py"
    sizes = [
        "--rows",
        "24",
        "--validation",
        "8",
        "--tokens",
        "40",
        "--new-tokens",
        "4",
        "--every",
        "2",
        "--target-ids",
        "50",
        "--dtype",
        "fp32",
    ]
    words = [
        sys.executable,
        str(script),
        "--model",
        str(folder / "plain"),
        "--json",
        str(tmp_path / "out.json"),
        *sizes,
    ]
    done = subprocess.run(words, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["ratio"] == pytest.approx(sum(result["workers"].values()) / sum(result["one process"].values()))
    assert "24 rows of 40 tokens, 4 decoded, 11 candidates" in done.stdout


def computed_rows(monkeypatch: pytest.MonkeyPatch, record: Path) -> Callable[[], int]:
    """Rows that workers compute from here on."""

    class Counting(EvaluationWorker):
        def compute(self, job: Any, rows: Any, folder: Path) -> dict[int, Any]:
            with record.open("a") as file:
                file.write(f"{len(rows)}\n")
            return super().compute(job, rows, folder)

    monkeypatch.setattr("tc_ray.evaluation.worker.EvaluationWorker", Counting)
    return lambda: sum(map(int, record.read_text().split())) if record.exists() else 0


@pytest.mark.slow
def test_a_killed_driver_s_work_is_kept(
    folder: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 after a part of the last pass; then only what is missing is computed, and the results are the same."""
    out = tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path; import tc_ray.evaluation.worker as worker\n"
        "from tc_ray.evaluation.worker import EvaluationWorker\n"
        "from tc_ray.run.evaluate import Asked, evaluate_models\n"
        "class Slow(EvaluationWorker):\n"
        "    def compute(self, job, rows, folder):\n"
        "        if job.kind == 'said' and 0 not in [number for number, _ in rows]: time.sleep(600)\n"
        "        return super().compute(job, rows, folder)\n"
        "worker.EvaluationWorker = Slow\n"
        "model, data, out = sys.argv[1:]\n"
        "evaluate_models([model], Asked({'sums': data}, out=Path(out)))\n"
    )
    words = [sys.executable, "-c", script, f"a={folder / 'fused'}", str(folder / "sums.jsonl"), str(out)]
    driver = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    try:
        while not any(len(list(part.glob("*.jsonl"))) for part in out.glob("parts/*") if said(part)):
            assert driver.poll() is None and time.monotonic() < end
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    kept = sum(len(part.read_text().splitlines()) for part in out.glob("parts/*/*.jsonl"))
    assert ROWS < kept < 2 * ROWS, "one pass is whole, the other is not"
    count = computed_rows(monkeypatch, tmp_path / "rows")
    evaluate_models([f"a={folder / 'fused'}"], asked(folder, out))
    assert count() == 2 * ROWS - kept
    for model in ("a", "a/pilot"):
        assert answers(out, model) == answers(undisturbed, model)


def said(part: Path) -> bool:
    """Whether it is a pass of texts."""
    return any('"found": ["' in file.read_text() for file in part.glob("*.jsonl"))


def test_changed_inputs_are_computed_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = computed_rows(monkeypatch, tmp_path / "rows")
    data, out = tmp_path / "sums.jsonl", tmp_path / "out"
    data.write_bytes((folder / "sums.jsonl").read_bytes())
    once = Asked({"sums": str(data)}, out=out)
    plain = str(folder / "plain")
    evaluate_models([plain], once)
    assert count() == 2 * ROWS
    evaluate_models([plain], once)
    assert count() == 2 * ROWS, "nothing has changed"
    parts = {part.name for part in (out / "parts").iterdir()}
    data.write_text(data.read_text().replace("39 + 1521", "39 + 1522"))
    evaluate_models([plain], once)
    assert count() == 4 * ROWS
    assert parts.isdisjoint(part.name for part in (out / "parts").iterdir()), "what nobody uses goes"
