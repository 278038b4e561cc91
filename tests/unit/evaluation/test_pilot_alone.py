"""The evaluation of a run whose Copilot failed: the Pilot alone, as lambda 0 would be."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tc_ray.config.fusion import FusionSection
from tc_ray.evaluation.decode import HeldOut
from tc_ray.evaluation.metric import ExactMatch
from tc_ray.evaluation.procedure import evaluate
from tests.support.tiny_model import make_tiny_llama, make_tokenizer


def test_the_pilot_alone_is_measured_and_the_report_says_why(tmp_path: Path) -> None:
    """Fault 10: a row whose answer is what the Pilot says is right, another is not; no word of a fused model."""
    pilot = AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path / "model"), dtype=torch.float32).eval()
    tokenizer, config = make_tokenizer(), FusionSection(max_new_tokens=4, eval_batch_size=2)
    prompts = [tokenizer(f"{n}+1=")["input_ids"] for n in (1, 22, 333)]
    said = [
        tokenizer.decode(
            pilot.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :],
            skip_special_tokens=True,
        )
        for ids in prompts
    ]
    rows = [
        HeldOut(number, ids, len(ids), answer, "prompt")
        for number, (ids, answer) in enumerate(zip(prompts, [said[0], "no such thing", said[2]], strict=True))
    ]
    lines: list[str] = []
    report = evaluate(
        pilot,
        ExactMatch(tokenizer, config),
        config,
        test=rows,
        data="rows",
        no_copilot="it failed",
        on_progress=lines.append,
    )
    assert (report.comparison.rows, report.comparison.pilot_correct) == (3, 2)
    assert (report.lam, report.exported_lam, report.helps) == (0.0, 0.0, False)
    assert report.verdict == (
        "There is no Copilot: it failed. The Pilot alone was measured, and is exported with lambda 0."
    )
    assert "fused" not in "\n".join(report.lines()) and "McNemar" not in report.markdown()
    assert report.to_dict()["no_copilot"] == "it failed"
    report.save(tmp_path)
    assert report.verdict in (tmp_path / "evaluation.md").read_text()
    assert lines == ["evaluate: test, the Pilot alone, 3 rows"]
