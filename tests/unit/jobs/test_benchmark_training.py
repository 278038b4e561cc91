"""jobs/benchmarks/copilot_training.py runs where Ray is absent and its numbers agree with each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "jobs" / "benchmarks" / "copilot_training.py"
WITHOUT_RAY = "import runpy, sys; sys.modules['ray'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')"


def test_copilot_training(tmp_path: Path) -> None:
    size = ["--hidden", "64", "--layers", "4", "--vocab", "3000", "--target-ids", "50"]
    batch = ["--rounds", "3", "--batch-size", "4", "--tokens", "24", "--targets", "6", "--dtype", "fp32"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, str(SCRIPT), *size, *batch, "--json", str(tmp_path / "out.json")],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    training, alone = result["training"], result["loss_alone"]
    assert training["outputs"] == {"targets": 50, "V": 3000}
    assert training["target_tokens_per_step"] == 24
    assert set(training["rows"]) == {
        "Pilot",
        *(f"{o} {f}" for o in ("targets", "V") for f in ("autograd", "blocks")),
    }
    for row in training["rows"].values():
        assert row["seconds"]["count"] == 3
        assert row["peak_bytes_per_target_token"] == pytest.approx(row["peak_bytes"] / 24)
    # the gradient of W_out, 3000 x 64 float32, is made in the step; that of the narrow output is not as large
    assert training["rows"]["V blocks"]["peak_bytes"] > 3000 * 64 * 4
    assert training["rows"]["V blocks"]["peak_bytes"] > training["rows"]["targets blocks"]["peak_bytes"]
    assert [row["tokens"] for row in alone] == [16, 32, 64, 128]
    # f, its residual and its derivative in float32 against no tensor of that size
    saved = alone[-1]["peak_bytes"]["autograd"] - alone[-1]["peak_bytes"]["blocks"]
    assert saved > 128 * 3000 * 4
    for words in (result["machine"], "Copilot, A = 3000, blocks", "blocks / autograd"):
        assert words in done.stdout
    parts = training["parts"]
    assert set(parts) == {"forward", "backward", "optimizer", "rest"}
    assert all(shares["count"] == 3 and shares["median"] > 0 for shares in parts.values())
    # measured in other steps of the same rounds: they add up to a step, roughly
    whole = sum(shares["median"] for shares in parts.values())
    assert 0.2 < whole / training["rows"]["targets blocks"]["ratio_to_pilot"] < 5
    assert "for 6 steps per round" in done.stdout
