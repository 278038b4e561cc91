"""Clients that others wrote, unmodified, over real HTTP: streams, history, usage and errors of each. They are installed by the test.

More of the openai package is in test_openai.py; lm-eval is in tests/cluster/serving/test_lm_eval.py, browsers are in
tests/cluster/serving/test_page_browser.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tc_ray.serving.deploy.settings import digest
from tests.support.other_clients import NODE, installed, run
from tests.support.serving_client import make_app, served, settings_of
from tests.support.serving_samples import make_export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEY = "a key for the tests"
CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("serving"), positions=2048)


@pytest.fixture(scope="module")
def url(export: Path) -> Iterator[str]:
    with served(make_app(settings_of(export, keys=(digest(KEY),)))) as url:
        yield url


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("guidellm") / "venv", "guidellm").parent / "guidellm"


@pytest.mark.parametrize("client", ["openai", "litellm", "langchain-openai", "instructor", "llm"])
def test_python_clients(tmp_path: Path, url: str, client: str) -> None:
    python = installed(tmp_path / "venv", client)
    done = run(python, CLIENTS / f"{client.split('-')[0]}_client.py", url, KEY)
    assert done.returncode == 0, done.stderr[-3000:]


def test_node_clients(tmp_path: Path, url: str) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not there")
    packages = [f"{name}@{version}" for name, version in NODE.items()]
    fetched = run("npm", "install", "--silent", "--no-audit", "--no-fund", *packages, folder=tmp_path)
    if fetched.returncode:
        pytest.skip(f"the clients cannot be installed: {fetched.stderr.strip()[-200:]}")
    shutil.copy(CLIENTS / "openai_client.mjs", tmp_path)
    done = run("node", "openai_client.mjs", url, KEY, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(program: Path, tmp_path: Path, url: str, export: Path, route: str) -> None:
    """A load generator: synthetic prompts of the served tokenizer, answers of a length that it fixes by `ignore_eos`."""

    def kind(name: str, **fields: object) -> str:
        return ",".join([f"kind={name}", *(f"{field}={value}" for field, value in fields.items())])

    report = tmp_path / "report.json"
    asked = ["--backend", kind("openai_http", target=url, api_key=KEY, request_format=route)]
    asked += ["--profile", kind("concurrent", streams=2), "--constraint", kind("max_requests", count=6)]
    asked += ["--tokenizer", kind("huggingface_auto", model=export / "pilot")]
    asked += ["--data", kind("synthetic_text", prompt_tokens=24, output_tokens=9)]
    asked += ["--output", kind("json", path=report)]
    done = run(program, "run", *asked, "--disable-console", folder=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    [benchmark] = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == 6 and not requests["errored"] and not requests["incomplete"]
    for one in requests["successful"]:
        assert one["output_tokens"] == 9 and one["prompt_tokens"] >= 24 and one["time_to_first_token_ms"] > 0


def test_curl(tmp_path: Path, url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not there")
    body = '{"model": "demo", "prompt": "Tom has 3 apples", "max_tokens": 3, "stream": true}'
    head = ("-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}")
    done = run("curl", "-sSN", *head, "-d", body, f"{url}/v1/completions")
    assert done.returncode == 0 and done.stdout.endswith("data: [DONE]\n\n"), done.stdout
    assert run("curl", "-sSI", f"{url}/health").stdout.startswith("HTTP/1.1 200")
    # an answer's message goes back as it came, and a refusal is a status
    chat = {"model": "demo", "messages": [{"role": "user", "content": "12 + 345?"}], "max_tokens": 3}
    answer = json.loads(run("curl", "-sS", *head, "-d", json.dumps(chat), f"{url}/v1/chat/completions").stdout)
    assert answer["usage"]["completion_tokens"] == 3
    chat["messages"] += [answer["choices"][0]["message"], {"role": "user", "content": "and?"}]
    (tmp_path / "body.json").write_text(json.dumps(chat), encoding="utf-8")
    again = run("curl", "-sSf", *head, "-d", f"@{tmp_path / 'body.json'}", f"{url}/v1/chat/completions")
    assert again.returncode == 0, again.stderr
    refused = run("curl", "-sSf", "-d", "{}", f"{url}/v1/chat/completions")
    assert refused.returncode == 22 and "401" in refused.stderr
