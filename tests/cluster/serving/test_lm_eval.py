"""EleutherAI's lm-eval, as it is, against a server: it gets the log-probabilities that /v1/score gives. The test installs it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.support.other_clients import installed, run
from tests.support.serving_process import ROOT, ServingProcess
from tests.support.serving_samples import make_export

ROWS = 4
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("lm-eval") / "venv", "lm-eval", "[api]").parent / "lm_eval"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("lm-eval"), positions=2048)


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[ServingProcess]:
    with ServingProcess(export) as server:
        yield server


def evaluate(
    program: Path, server: ServingProcess, export: Path, out: Path, query: str
) -> dict[str, list[dict[str, Any]]]:
    """Samples of each task, as lm-eval logs them."""
    model = f"model=demo,base_url={server.address}/v1/completions?{query},tokenizer={export / 'pilot'}"
    model += ",tokenizer_backend=huggingface,num_concurrent=2"
    asked = ("--model", "local-completions", "--model_args", model, "--include_path", "jobs/lm_eval")
    asked += ("--tasks", "tc_ray_family,tc_ray_family_generate", "--limit", str(ROWS), "--batch_size", "4")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    done = run(program, *asked, "--log_samples", "--output_path", out, folder=ROOT, **offline)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-1500:])
    found = {}
    for task in ("tc_ray_family", "tc_ray_family_generate"):
        [file] = out.rglob(f"samples_{task}_2*.jsonl")
        found[task] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return found


def ask(server: ServingProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = Request(server.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as response:
        return dict(json.load(response))


@pytest.mark.parametrize("lam", [0.0, 0.5, None])
def test_it_sees_the_models_own_log_probabilities(
    program: Path, server: ServingProcess, export: Path, tmp_path: Path, lam: float | None
) -> None:
    weight = {} if lam is None else {"copilot": {"lambda": lam}}
    query = "score_after=.%0A" + ("" if lam is None else f"&lambda={lam}")
    samples = evaluate(program, server, export, tmp_path, query)
    assert [len(rows) for rows in samples.values()] == [ROWS, ROWS]
    for row in samples["tc_ray_family"]:
        question, choices = row["doc"]["question"], row["doc"]["choices"]
        # lm-eval counts the line end before the answer as part of it; the Copilot begins after it
        line_end = ask(server, "/v1/score", {"model": "demo", "prompt": question, "completion": "\n"})
        answers = [
            ask(server, "/v1/score", {"model": "demo", "prompt": question + "\n", "completion": choice, **weight})
            for choice in choices
        ]
        # token by token: an impossible one counts as LOG_OF_ZERO each time
        expected = [
            line_end["completions"][0]["pilot"] + sum(one["fused"] for one in answer["completions"][0]["tokens"])
            for answer in answers
        ]
        told = [float(one[0][0]) for one in row["resps"]]
        assert len(told) == len(choices) == 12
        assert all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-3) for a, b in zip(told, expected, strict=True))
        assert row["acc"] == float(max(range(12), key=expected.__getitem__) == row["doc"]["answer"])
    for row in samples["tc_ray_family_generate"]:
        body = {"model": "demo", "prompt": row["doc"]["question"] + "\n", "max_tokens": 16, "temperature": 0}
        own = ask(server, "/v1/completions", {**body, "stop": ["\n"], **weight})
        assert row["resps"] == [[own["choices"][0]["text"]]]
