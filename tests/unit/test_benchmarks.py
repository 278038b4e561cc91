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


def test_copilot_cost(tmp_path: Path) -> None:
    printed, result = run("copilot_cost.py", tmp_path, "--new-tokens", "4")
    training = result["training"]
    assert (training["pilot_step_seconds"]["count"], training["copilot_step_seconds"]["count"]) == (3, 9)
    assert training["ratio_per_round"] == pytest.approx(3 * training["ratio_per_record"])
    assert [row["batch_size"] for row in result["decoding"]] == [1, 8]
    assert all(row["ratio_of_medians"] > 0 for row in result["decoding"])
    assert "Copilot / Pilot" in printed and "decoding 4 tokens" in printed
