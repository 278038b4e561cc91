"""The command `llm`, with a model from its own configuration file, and a conversation. Arguments: address, key."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, key = sys.argv[1:]
folder = Path(tempfile.mkdtemp())
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: demo\n  model_name: demo\n  api_base: {url}/v1\n  api_key_name: demo\n"
)
environment = {**os.environ, "LLM_USER_PATH": str(folder)}


def llm(*words: str, fails: bool = False) -> str:
    command = [str(Path(sys.executable).parent / "llm"), *words]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert bool(done.returncode) == fails, done.stderr
    return done.stderr if fails else done.stdout


options = ("--key", key, "-m", "demo", "-o", "max_tokens", "12", "-o", "temperature", "0")
streamed = llm(*options, "12 + 345?")
assert streamed.strip() == llm(*options, "--no-stream", "12 + 345?").strip() != ""
assert llm("-c", "--key", key, "and?").strip()
refused = llm("--key", "wrong", "-m", "demo", "2", fails=True)
assert "A valid API key is needed" in refused, refused
logged = llm("logs", "list", "--json", "-n", "1")
assert '"input_tokens"' in logged and '"output_tokens"' in logged, logged
