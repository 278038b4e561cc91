"""The Pilot of a run as others load it: merged weights, LoRA adapters, or GGUF. The work behind `tc-ray export`.

Invariant: a folder appears whole, by a rename, after what was written has been read back and compared with `pilot/final`; it never
replaces another. The model is read from the run's folder, so nothing is trained or merged again. Read first: `export_pilot`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig
from tc_ray.export.card import CardSource, shown, write_card
from tc_ray.export.check import ExportError
from tc_ray.files import FOLDER_MARKER, is_whole, mark_whole, read_json, sync, write_json
from tc_ray.models.folder import ADAPTER, PILOT

Form = Literal["merged", "adapter", "gguf"]
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NO_TOKENIZER = ("config.json", "generation_config.json", FOLDER_MARKER)
_ROUNDING = {"bf16": 2.0**-7, "fp32": 1e-5}
"""Between a weight merged here and the one merged in training, of its largest: another processor adds products in another order,
and a sum that falls between two numbers is then rounded to the other one."""


@dataclass(frozen=True)
class PilotSource:
    """The Pilot of a run that has ended. model: `pilot/final`."""

    run: Path
    config: RunConfig
    model: Path

    @classmethod
    def of(cls, run: Path | str) -> PilotSource:
        """Of a run folder. Raises ExportError: it is none, or its Pilot is not whole."""
        folder = Path(run).expanduser().absolute()
        if not (folder / "config.yaml").is_file() or not (folder / PILOT).is_dir():
            raise ExportError(
                f"{folder} is no run folder (config.yaml and pilot/ are missing); give the folder of a run"
            )
        model = folder / PILOT / "final"
        if not is_whole(model):
            raise ExportError(f"{folder} holds no finished Pilot: has `tc-ray train` ended?")
        return cls(folder, load_saved_config(folder / "config.yaml"), model)


def export_pilot(run: Path | str, form: Form, out: Path | None) -> Path:
    """Write the Pilot of a run to `out` (default: `export-FORM` in the run's folder), with a model card. Returns the folder.

    Raises:
        ExportError: no finished run, `out` exists, no adapters, or the base is not at hand (adapters are checked on it).
        GgufError: a Pilot that cannot be written as GGUF here. ExportMismatchError: read back, it is another model.
        WeightsError, NotFiniteError, ModelSourceError: the run's or the base's weights are damaged.
    """
    source = PilotSource.of(run)
    out = (out or source.run / f"export-{form}").expanduser().absolute()
    if out.exists() or out.is_symlink():
        raise ExportError(f"{out} exists; remove it, or name another folder with --out")
    write = _WRITERS[form](source)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        write(temporary)
        write_card(temporary, form, CardSource.of_run(source.run, source.config, source.model))
        mark_whole(temporary)
        os.rename(temporary, out)  # never replaces a folder, unlike `publish_folder`
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _merged(source: PilotSource) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from tc_ray.export.compare import compare_logits, compare_weights

        _copy(source.model, folder, lambda name: name != FOLDER_MARKER)
        pilot, again = _load(source.model), _load(folder)
        compare_weights(again, pilot, 0.0, "the folder, read back,")
        compare_logits(again, pilot, 0.0, "the folder, read back,")

    return write


def _gguf(source: PilotSource) -> Callable[[Path], None]:
    from transformers import AutoConfig

    from tc_ray.export.gguf_file import FILE, check_family, check_gguf, write_gguf

    check_family(AutoConfig.from_pretrained(source.model, trust_remote_code=False))

    def write(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source.model, trust_remote_code=False)
        pilot = _load(source.model, source.config.pilot.dtype)
        write_gguf(pilot, tokenizer, folder / FILE, name=source.config.run.name)
        check_gguf(folder / FILE, pilot.float(), tokenizer)

    return write


def _adapter(source: PilotSource) -> Callable[[Path], None]:
    from tc_ray.models.hub import resolve_model
    from tc_ray.models.pilot.load import check_quantization

    if source.config.pilot.method != "lora":
        raise ExportError(f"{source.run} trained all weights (pilot.method: full): it has no adapters; use --to merged")
    if source.config.model.random_weights:
        raise ExportError(
            f"{source.run} began with random weights, which are in the merged model only; use --to merged"
        )
    adapter = source.run / PILOT / ADAPTER
    if not is_whole(adapter):
        raise ExportError(f"{adapter} is missing or not whole: adapters were not kept by this run; use --to merged")
    try:
        check_quantization(source.config)
    except ValueError as error:
        raise ExportError(str(error)) from None
    base = resolve_model(source.config.model.pilot, source.config.model.cache)

    def write(folder: Path) -> None:
        _copy(adapter, folder, lambda name: name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        _copy(
            source.model,
            folder,
            lambda name: not name.endswith((".safetensors", ".index.json")) and name not in _NO_TOKENIZER,
        )
        settings = read_json(folder / ADAPTER_CONFIG)
        write_json(folder / ADAPTER_CONFIG, settings | {"base_model_name_or_path": shown(source.config.model.pilot)})
        _check_adapter(folder, base, source)

    return write


def _check_adapter(folder: Path, base: Path | str, source: PilotSource) -> None:
    """Raise ExportMismatchError unless base and adapters, merged by peft, have the weights of `pilot/final`."""
    from peft import PeftModel

    from tc_ray.export.compare import compare_weights
    from tc_ray.models.pilot.load import DTYPES

    dtype, nf4 = source.config.pilot.dtype, source.config.pilot.quantization == "nf4"
    # in training the base had the run's type, and the products were added to it in fp32
    found = PeftModel.from_pretrained(_load(base, dtype, nf4=nf4).float(), folder).merge_and_unload()
    compare_weights(
        found.to(DTYPES[dtype]), _load(source.model, dtype), _ROUNDING[dtype], "the base with these adapters"
    )


_WRITERS: dict[Form, Callable[[PilotSource], Callable[[Path], None]]] = {
    "merged": _merged,
    "adapter": _adapter,
    "gguf": _gguf,
}
"""Of each form: what checks the run, before anything is written, and returns what writes the folder and reads it back."""


def _load(model: Path | str, dtype: str = "fp32", *, nf4: bool = False) -> Any:
    """nf4: with the weights that a run of `pilot.quantization` computed with, in full again."""
    from tc_ray.models.pilot.load import DTYPES, load_pilot

    pilot = load_pilot(model, dtype=DTYPES[dtype], nf4=nf4).eval()
    return pilot.dequantize(DTYPES[dtype]) if nf4 else pilot


def _copy(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted(path.name):
            shutil.copyfile(path, target / path.name)
