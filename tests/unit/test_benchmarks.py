"""The benchmark scripts run from anywhere on a tiny model and report consistent numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_tiny_llama

SCRIPTS = Path(__file__).resolve().parents[2] / "jobs" / "benchmarks"


def run(script: str, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    model = make_tiny_llama(folder / "tiny")
    common = [
        "--model",
        str(model),
        "--rounds",
        "3",
        "--batch-size",
        "4",
        "--tokens",
        "24",
        "--targets",
        "6",
        "--dtype",
        "fp32",
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *common, "--json", str(folder / "out.json"), *options],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_logging_overhead(tmp_path: Path) -> None:
    printed, result = run("logging_overhead.py", tmp_path)
    assert result["on_seconds"]["count"] == result["off_seconds"]["count"] == 3
    ratio = result["on_seconds"]["median"] / result["off_seconds"]["median"]
    assert result["ratio_of_medians"] == pytest.approx(ratio)
    # bf16 states of every position but the last, 65 errors of 8 bytes a target token: the records were really written
    tokens = result["tokens_per_round"]
    assert result["log_bytes_per_round"] > (tokens - 4) * 32 * 2 + 4 * 6 * 65 * 8
    for words in (result["machine"], "logging on", f"{ratio:.4f}", "median of pair ratios"):
        assert words in printed


@pytest.mark.parametrize(
    ("options", "least_bytes"),
    [
        (("--rationale", "all"), 23 * 4 * 32 * 2),
        (("--rationale", "1,3", "--error", "dense"), 23 * 2 * 32 * 2 + 6 * 258 * 4),
    ],
)
def test_logging_overhead_of_other_logs(tmp_path: Path, options: tuple[str, ...], least_bytes: int) -> None:
    """Of 4 sequences of 24 tokens, give or take a fifth, 6 of them targets; d 32, 4 layers, V 258."""
    printed, result = run("logging_overhead.py", tmp_path, *options)
    assert result["log_bytes_per_round"] > 0.8 * 4 * least_bytes
    assert result["log_bytes_per_token"] == pytest.approx(result["log_bytes_per_round"] / 24 / 4, rel=0.2)
    assert "B a token" in printed


def measure(script: str, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """An inference benchmark on a Llama of random weights with a narrower Copilot."""
    size = ["--hidden", "64", "--layers", "3", "--vocab", "300", "--copilot-hidden", "32", "--copilot-layers", "2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *size, "--dtype", "fp32", "--json", str(folder / "out.json"), *options],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_decoding(tmp_path: Path) -> None:
    printed, result = measure("decoding.py", tmp_path, "--batches", "1", "3", "--new-tokens", "8", "--prompt", "10")
    assert [row["batch_size"] for row in result["decoding"]] == [1, 3]
    assert all(row["pilot_seconds"]["count"] == row["fused_seconds"]["count"] == 4 for row in result["decoding"])
    pilot, copilot = result["bytes"]
    # three layers of 64: q, k, v, o with one of one head, three of 4 x 64, norms; the tied head; the last norm
    layer = 64 * 64 * 2 + 2 * 64 * 64 + 3 * 64 * 256 + 2 * 64
    assert pilot == 4 * (3 * layer + 300 * 64 + 64)
    assert result["bound"] == pytest.approx((pilot + copilot) / pilot)
    assert 0 < copilot < pilot and "ratio / bound" in printed


def test_prefill(tmp_path: Path) -> None:
    printed, result = measure("prefill.py", tmp_path, "--batches", "2", "--prompts", "8", "16", "--rounds", "3")
    assert [(row["batch_size"], row["prompt_tokens"]) for row in result["prefill"]] == [(2, 8), (2, 16)]
    assert all(row["median_of_pair_ratios"] > 0 for row in result["prefill"]) and "2 x 16" in printed
