"""The benchmark scripts run from anywhere on a tiny model and report consistent numbers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.tiny_model import make_tiny_llama

SCRIPTS = Path(__file__).resolve().parents[3] / "jobs" / "benchmarks"


def run(script: str, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    model = make_tiny_llama(folder / "tiny")
    common = ["--model", str(model), "--rounds", "3", "--batch-size", "4", "--tokens", "24", "--targets", "6"]
    return in_this_process(script, folder, *common, "--dtype", "fp32", *options)


@pytest.mark.parametrize(
    ("options", "least_bytes"),
    [
        (("--rationale", "all"), 23 * 4 * 32 * 2),
        (("--rationale", "1,3", "--error", "dense"), 23 * 2 * 32 * 2 + 6 * 258 * 4),
    ],
)
def test_logging_overhead(tmp_path: Path, options: tuple[str, ...], least_bytes: int) -> None:
    """Of 4 sequences of 24 tokens, give or take a fifth, 6 of them targets; d 32, 4 layers, V 258."""
    printed, result = run("logging_overhead.py", tmp_path, *options)
    assert result["on_seconds"]["count"] == result["off_seconds"]["count"] == 3
    ratio = result["on_seconds"]["median"] / result["off_seconds"]["median"]
    assert result["ratio_of_medians"] == pytest.approx(ratio)
    # the records were really written
    assert result["log_bytes_per_round"] > 0.8 * 4 * least_bytes
    assert result["log_bytes_per_token"] == pytest.approx(result["log_bytes_per_round"] / 24 / 4, rel=0.2)
    for words in (result["machine"], "logging on", f"{ratio:.4f}", "median of pair ratios", "B per token"):
        assert words in printed


def test_padding(tmp_path: Path) -> None:
    """The same rows in four ways: grouped and packed rounds have less padding, counted exactly."""
    texts = [{"prompt": "What is " + "one and " * (n % 9) + "two?", "completion": f"{n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in texts))
    model = make_tiny_llama(tmp_path / "tiny")
    options = ["--model", str(model), "--rounds", "2", "--batch-size", "8", "--dtype", "fp32", "--cutoff", "128"]
    printed, result = in_this_process("padding.py", tmp_path, str(tmp_path / "rows.jsonl"), *options)
    shares = result["padding"]
    assert result["examples"] == 40 and 0 <= shares["both"] <= shares["grouped"] < shares["neither"]
    assert shares["packed"] < shares["neither"] and f"{100 * shares['packed']:.1f}%" in printed
    assert all(len(found["wall"]) == 2 for found in result["seconds"].values())


@pytest.mark.slow
def test_copilot_workers(tmp_path: Path) -> None:
    size = "--hidden 64 --layers 10 --vocab 300 --target-ids 50 --rounds 2 --batch-size 4 --tokens 24 --targets 6 --dtype fp32"
    printed, result = alone("copilot_workers.py", tmp_path, *size.split())
    rows = result["rows"]
    assert set(rows) == {"alone", "flattened", "overlapped"} and all(row["count"] == 2 for row in rows.values())
    assert rows["flattened"]["ratio_to_flattened"] == 1.0 and f"{result['parameters']:,} trained numbers" in printed


MODELS = ["--hidden", "64", "--layers", "3", "--vocab", "300", "--dtype", "fp32"]
MODELS += ["--copilot-hidden", "32", "--copilot-layers", "2"]
"""For inference: a Llama of random weights with a narrower Copilot."""


def in_this_process(script: str, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """As `alone`, without a new start of Python."""
    words = [str(SCRIPTS / script), "--json", str(folder / "out.json"), *options]
    printed, threads = io.StringIO(), torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "path", list(sys.path)),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(words[0], run_name="__main__")
    torch.set_num_threads(threads)
    return printed.getvalue(), json.loads((folder / "out.json").read_text())


def alone(script: str, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What a script has printed, and the JSON that it wrote."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), "--json", str(folder / "out.json"), *options],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_decoding(tmp_path: Path) -> None:
    printed, result = in_this_process(
        "decoding.py", tmp_path, *MODELS, "--batches", "1", "3", "--new-tokens", "8", "--prompt", "10"
    )
    assert [row["batch_size"] for row in result["decoding"]] == [1, 3]
    assert all(row["pilot_seconds"]["count"] == row["fused_seconds"]["count"] == 4 for row in result["decoding"])
    pilot, copilot = result["bytes"]
    # three layers of 64: q, k, v, o with one of one head, three of 4 x 64, norms; the tied head; the last norm
    layer = 64 * 64 * 2 + 2 * 64 * 64 + 3 * 64 * 256 + 2 * 64
    assert pilot == 4 * (3 * layer + 300 * 64 + 64)
    assert result["bound"] == pytest.approx((pilot + copilot) / pilot)
    assert 0 < copilot < pilot and "ratio / bound" in printed


def test_prefill(tmp_path: Path) -> None:
    printed, result = in_this_process(
        "prefill.py", tmp_path, *MODELS, "--batches", "2", "--prompts", "8", "16", "--rounds", "3"
    )
    assert [(row["batch_size"], row["prompt_tokens"]) for row in result["prefill"]] == [(2, 8), (2, 16)]
    assert all(row["median_of_pair_ratios"] > 0 for row in result["prefill"]) and "2 x 16" in printed


@pytest.mark.slow
def test_serving(tmp_path: Path) -> None:
    short = ["--prompt", "8", "--new-tokens", "6", "--seconds", "1", "--warm-up", "0.3", "--repeats", "1"]
    # one thread: two that wait for each other on busy cores may not end a single request in a second
    rows = ["--clients", "1", "3", "--against", "2", "--threads", "1"]
    printed, result = alone("serving.py", tmp_path, *MODELS, *rows, *short)
    assert result.keys() == {
        *("machine", "settings", "bytes", "bound", "runs", "fused_to_pilot", "of_bound", "to_one_by_one")
    }
    engine = {f"{clients} clients, {model}" for clients in (1, 3) for model in ("Pilot", "fused")}
    assert result["runs"].keys() == engine | {"one by one, fused", "static batches of 2, fused"}
    for (run,) in result["runs"].values():
        assert run["requests"] > 0 and run["tokens_per_second"] > 0
        assert 0 < run["first_token_median_s"] <= run["first_token_p95_s"]
    rate = {name: run["tokens_per_second"] for name, (run,) in result["runs"].items()}
    assert result["fused_to_pilot"]["3"] == pytest.approx(rate["3 clients, fused"] / rate["3 clients, Pilot"])
    pilot, copilot = result["bytes"]
    assert result["bound"] == pytest.approx(pilot / (pilot + copilot))
    assert result["machine"] in printed and "to one by one" in printed


@pytest.mark.slow
def test_serving_bursts_and_long_prompts(tmp_path: Path) -> None:
    short = [
        "--prompt",
        "8",
        "--new-tokens",
        "6",
        "--seconds",
        "2",
        "--warm-up",
        "0.3",
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    printed, result = alone(
        "serving.py", tmp_path, *MODELS, *short, "--clients", "2", "--burst", "3", "--long-prompt", "3000"
    )
    [burst] = result["burst"]
    assert all(len(first) == 3 and first == sorted(first) for first in burst.values()) and "3 at once" in printed
    for median, late, longest in result["long_prompt"]["2"]:
        assert 0 < median <= late <= longest


@pytest.mark.slow
def test_log_throughput(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = ["--megabytes", "5", "--file-megabytes", "2", "--repeats", "1", "--folder", str(disk)]
    printed, result = alone("log_throughput.py", tmp_path, *sizes)
    pairs = {"write", *(f"read {state}{way}" for state in ("warm", "cold") for way in ("", ", mapped"))}
    assert result["ratio"].keys() == result["ratio_quartiles"].keys() == pairs
    assert 5 < result["megabytes"] < 8
    reads = {f"read {state} {way}" for state in ("warm", "cold") for way in ("bare", "mapped", "log")}
    assert result["seconds"].keys() == {"write bare", "write log"} | reads
    # two reads of each kind a repeat, one write
    assert {name: found["count"] for name, found in result["seconds"].items()} == {
        name: 1 + (name in reads) for name in result["seconds"]
    }
    for name, rate in result["megabytes_per_second"].items():
        assert rate == pytest.approx(result["megabytes"] / result["seconds"][name]["median"])
    assert result["machine"] in printed and "log / pyarrow" in printed
    assert not list(disk.iterdir()), "the records are left on the disk"


@pytest.mark.slow
def test_log_memory(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--minutes", "0.18", "--rounds-per-second", "20", "--folder", str(disk)]
    printed, result = alone("log_memory.py", tmp_path, *options)
    assert result["settings"] == {"minutes": 0.18, "rounds_per_second": 20, "slower": 10}
    for role in ("write", "read"):
        assert len(result["samples"][role]) >= 2 and result["last"][role] == result["samples"][role][-1]
        memory = result["memory"][role]
        assert memory["samples"] == len(result["samples"][role])
        assert 0 < memory["first_quarter_megabytes"] <= memory["peak_megabytes"]
        assert memory["peak_megabytes"] >= memory["last_quarter_megabytes"] > 0
        assert "megabytes_per_hour" in memory
    # both were at work: rows were written, and some of them read
    assert result["last"]["write"]["round"] > 20 and result["last"]["read"]["buffer_megabytes"] > 1
    assert result["machine"] in printed and "MB / hour" in printed
    assert not list(disk.iterdir()), "the log is left on the disk"


@pytest.mark.slow
def test_gpu_check_on_a_processor(tmp_path: Path) -> None:
    """The commands of the GPU check with tiny models, the whole run under Ray among them."""
    script = SCRIPTS / "gpu_check.sh"
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(SCRIPTS.parents[1])}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0 and "not done" not in done.stdout, done.stdout[-3000:]
    for part in ("logging", "copilot_step", "decoding", "prefill", "serving"):
        assert json.loads((tmp_path / f"{part}.json").read_text())["machine"]
    assert (tmp_path / "run" / "export").is_dir()
