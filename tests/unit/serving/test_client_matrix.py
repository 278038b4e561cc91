"""Clients that others wrote, unmodified, over real HTTP: streams, history, usage and errors of each. They are installed by the test.

The openai package for Python is in test_openai.py, lm-eval in tests/cluster/serving/test_lm_eval.py, browsers in
tests/cluster/serving/test_page_browser.py.
"""

from __future__ import annotations

import shutil
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tc_ray.serving.deploy.settings import digest
from tests.support.serving_client import make_app, served, settings_of
from tests.support.serving_samples import make_export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEY = "a key for the tests"
CLIENTS = Path(__file__).parent / "clients"
PYTHON = ("litellm==1.110.2", "langchain-openai==1.7.4", "instructor==1.17.0", "llm==0.36")
NODE = ("openai", "ai", "@ai-sdk/openai-compatible", "zod")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    export = make_export(tmp_path_factory.mktemp("serving"), positions=512)
    with served(make_app(settings_of(export, keys=(digest(KEY),)))) as url:
        yield url


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of its own, with the clients: their dependencies are no business of tc-ray's."""
    folder = tmp_path_factory.mktemp("clients") / "venv"
    venv.create(folder, with_pip=True)
    done = run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *PYTHON)
    if done.returncode:
        pytest.skip(f"the clients cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "python"


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("client", ["litellm", "langchain", "instructor", "llm"])
def test_python_clients(python: Path, url: str, client: str) -> None:
    done = run(python, CLIENTS / f"{client}_client.py", url, KEY)
    assert done.returncode == 0, done.stderr[-3000:]


def test_node_clients(tmp_path: Path, url: str) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not there")
    installed = run("npm", "install", "--silent", "--no-audit", "--no-fund", *NODE, folder=tmp_path)
    if installed.returncode:
        pytest.skip(f"the clients cannot be installed: {installed.stderr.strip()[-200:]}")
    shutil.copy(CLIENTS / "openai_client.mjs", tmp_path)
    done = run("node", "openai_client.mjs", url, KEY, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_curl(url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not there")
    body = '{"model": "demo", "prompt": "Tom has 3 apples", "max_tokens": 3, "stream": true}'
    head = ("-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}")
    done = run("curl", "-sSN", *head, "-d", body, f"{url}/v1/completions")
    assert done.returncode == 0 and done.stdout.endswith("data: [DONE]\n\n"), done.stdout
    assert run("curl", "-sSI", f"{url}/health").stdout.startswith("HTTP/1.1 200")
