"""The rows of the lm-eval task are what its page says: made by reasoning-gym from the seed named there, and none of the demo's."""

from __future__ import annotations

import json
from pathlib import Path

import reasoning_gym

from tc_ray.config.load import load_config
from tc_ray.data.source.embedded import write_embedded

ROOT = Path(__file__).resolve().parents[3]
SEED = 20251125


def test_the_rows_are_those_of_the_seed_and_none_of_the_demo_s(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (ROOT / "jobs/lm_eval/family.jsonl").read_text().splitlines()]
    assert len(rows) == 100
    page = (ROOT / "jobs/lm_eval/README.md").read_text()
    assert "100 rows" in page and f"seed {SEED}" in page
    made = {
        e["question"]: e["answer"] for e in reasoning_gym.create_dataset("family_relationships", size=400, seed=SEED)
    }
    for row in rows:
        assert row["choices"][row["answer"]] == made[row["question"]] and len(set(row["choices"])) == 12
    demo = load_config("demo")
    write_embedded(demo.data, tmp_path / "demo.jsonl", demo.run.seed)
    asked = {json.loads(line)["prompt"] for line in (tmp_path / "demo.jsonl").read_text().splitlines()}
    assert len(asked) > 1000 and not asked & {row["question"] for row in rows}
