"""What identifies a model or a tokenizer: hashes for logs, checkpoints and provenance.

Invariant: a hash follows from content. That of weights follows from config.json and from the names, types, shapes and bytes of
the tensors, not from how they are divided over files, nor from where or when these were written. Called by the driver before
any worker starts, by the log's metadata, by exports and by serving.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_CONTENT = ("_name_or_path", "transformers_version")
"""Keys of config.json that say where and by which version it was written."""


class ModelSourceError(RuntimeError):
    """A model is not available or damaged; the message names it and says what to do."""


def weights_hash(path: Path | str, *, random_weights: bool = False) -> str:
    """16 hex digits over config and weights of a model, every byte of them. Raises ModelSourceError for a damaged file.

    path: model folder; or a hub id or the hub's own folder for one, which is identified by its commit.
    random_weights: the weights are made from the config and not read.
    """
    folder = Path(path)
    known = snapshot_of(folder)
    if known is not None:
        return _digest(["hub", *known])
    if not folder.is_dir():
        from transformers import AutoConfig

        commit = getattr(AutoConfig.from_pretrained(str(path), trust_remote_code=False), "_commit_hash", None)
        return _digest(["hub", str(path), commit])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content: list[Any] = [{key: value for key, value in config.items() if key not in _NO_CONTENT}]
    if random_weights:
        return _digest([*content, "random"])
    # an index may name shards as it likes, and adapters are loaded too; consolidated.safetensors, Mistral's form, is not
    files = [file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated")]
    if files:
        return _digest([*content, sorted(tensor for file in files for tensor in _tensors(file))])
    return _digest([*content, [_sha256(file) for file in sorted(folder.glob("*.bin"))]])


def snapshot_of(folder: Path | str) -> tuple[str, str] | None:
    """(hub id, commit) of a folder in the hub's cache, models--OWNER--NAME/snapshots/COMMIT, there or not; None: another folder."""
    found = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?$", str(folder))
    return (found[1].replace("--", "/"), found[2]) if found else None


def model_identity(folder: Path) -> str:
    """Name of a model folder's content, for provenance: `<folder name>@<16 hex digits>`, in milliseconds at any size.

    The digits are a fingerprint: config.json and, of each weight file, its length and 64 blocks of 64 KiB spread evenly over it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for weights in sorted(folder.glob("*.safetensors")):
        size = weights.stat().st_size
        digest.update(f"{weights.name}:{size}".encode())
        with weights.open("rb") as file:
            for block in range(64):
                file.seek(block * max(size - 65536, 0) // 63)
                digest.update(file.read(65536))
    return f"{folder.name}@{digest.hexdigest()[:16]}"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over all that decides how text becomes ids: tokenizer model, special tokens, chat template.

    Padding and truncation settings are left out: they change with use, and tc-ray pads and cuts itself.
    """
    return _digest([_rules(tokenizer), tokenizer.special_tokens_map, tokenizer.chat_template])


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over what gives token ids their meaning: `tokenizer_hash` without templates and special-token roles.

    Two models with the same hash can share a Copilot, whatever each is padded to or prompted with.
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


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a safetensors file, from its header alone. Raises ModelSourceError if it is damaged."""
    with _opened(file, "numpy") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - it is no dict


def _tensors(file: Path) -> list[tuple[str, str, str, str]]:
    """(name, type, shape, SHA-256) of the tensors of a safetensors file."""
    import torch

    with _opened(file, "pt") as weights, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:

        def described(name: str) -> tuple[str, str, str, str]:
            content = weights.get_tensor(name).reshape(-1).view(torch.uint8).numpy()  # a map of the file, not a copy
            part = weights.get_slice(name)
            return name, part.get_dtype(), str(part.get_shape()), hashlib.sha256(content).hexdigest()

        return list(threads.map(described, weights.keys()))  # hashing releases the interpreter's lock


def _opened(file: Path, framework: str) -> Any:
    """safetensors' own reader, which compares header and length."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework)
    except SafetensorError as error:
        raise ModelSourceError(f"{file} is damaged ({first_line(error)}); fetch the model again") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
