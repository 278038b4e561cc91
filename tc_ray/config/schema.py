"""Typed configuration of a run: one pydantic model per section, unknown keys are errors.

`RunConfig` is the one document of a run. `config.load` reads it, the run folder keeps it resolved, and every worker gets it
unchanged. The larger sections have modules of their own; rules over several sections stand here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tc_ray.config.data import DataSection
from tc_ray.config.fusion import FusionSection
from tc_ray.config.log import LogSection
from tc_ray.config.redact import STRUCK_OUT, redact_address, redact_known, redact_options, secrets_of
from tc_ray.config.section import MayChange, Named, Positive, Section
from tc_ray.config.serving import ServingSection
from tc_ray.config.tracking import TrackingSection
from tc_ray.config.training import PAPER_TOP_K, CopilotSection, PilotSection

_TRAINED_TEXT = ("plain_template", "completion_pattern", "system")
"""Fields of `data` that shape what is trained on: saved to the letter, whatever looks like an address in them."""


class RunSection(Section):
    """What the run is called and where everything it makes is kept."""

    name: str = Field("tc-ray", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run name: letters, digits, . _ -")
    folder: MayChange[Path | None] = Field(
        None, description="run folder; default outputs/<name>. An existing one is resumed"
    )
    seed: int = Field(17, description="seeds data order, initialisation, dropout and sampling")
    trust_folder: MayChange[bool] = Field(
        False,
        description="resume a run folder that holds files of another user: its checkpoints are pickles, which can run any code",
    )

    @property
    def path(self) -> Path:
        """Absolute run folder."""
        return (self.folder or Path("outputs") / self.name).expanduser().absolute()


class ModelSection(Section):
    """Where the models come from."""

    pilot: str = Field(
        "smollm2-135m-instruct", description="local folder, hub id, or the builtin name smollm2-135m-instruct"
    )
    copilot: str | None = Field(
        None, description="pretrained decoder that initialises the Copilot; default: same as pilot"
    )
    random_weights: bool = Field(
        False, description="build the Pilot from its config with random weights (tests, training from scratch)"
    )
    attn_implementation: str | None = Field(
        None,
        description="how the Pilot computes attention in training, as transformers names it: eager, sdpa, flash_attention_2, ...; "
        "null: transformers' choice",
    )
    cache: MayChange[Path | None] = Field(
        None, description="where converted builtin models are kept; default $TC_RAY_CACHE, else ~/.cache/tc-ray"
    )


class CallbacksSection(Section):
    """Functions of the user that a run calls, each as module:function (docs/extending.md)."""

    on_round: Named | None = Field(
        None,
        description="called with (round, metrics) after each round of the Pilot, in its first worker, which waits for it",
    )
    on_checkpoint: Named | None = Field(
        None,
        description="called with (round, folder) after each checkpoint of the Pilot, in its first worker, which waits for it",
    )
    on_evaluation: Named | None = Field(
        None, description="called with (report, folder) after the run's evaluation, in the driver"
    )


_GPUS = (
    "1: it computes on a GPU of its own (nccl); a fraction: on one that it shares; 0: on the CPU (gloo). For more GPUs "
    "set more workers"
)
_PINS = "a worker runs only on a node that has them, for instance {'accelerator_type:H100': 0.01}"
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
"""Resources of every node, which have fields of their own or none."""
CustomResources = dict[str, Annotated[float, Field(ge=1e-4)]]
"""Amounts by name; Ray counts in units of 1e-4."""


class ResourcesSection(Section):
    """Processes, what each may use, and where they run."""

    pilot_workers: MayChange[Positive] = Field(
        1, description="processes that train the Pilot, each on a part of every batch"
    )
    pilot_min_workers: MayChange[Positive | None] = Field(
        None,
        description="fewest workers that the Pilot starts with while the cluster has no room for pilot_workers; it goes on with more "
        "once there is room; null: it waits for all",
    )
    pilot_cpus: MayChange[float] = Field(1, gt=0, description="Ray CPUs per Pilot worker")
    pilot_gpus: MayChange[float] = Field(0, ge=0, le=1, description=f"GPU per Pilot worker. {_GPUS}")
    pilot_resources: MayChange[CustomResources] = Field(
        default_factory=dict, description=f"custom Ray resources per Pilot worker and evaluation worker: {_PINS}"
    )
    pilot_threads: MayChange[Positive] = Field(1, description="torch threads per Pilot worker")
    copilot_workers: MayChange[Positive] = Field(
        1, description="processes that train the Copilot, each on a part of every batch"
    )
    copilot_cpus: MayChange[float] = Field(1, gt=0, description="Ray CPUs per Copilot worker")
    copilot_gpus: MayChange[float] = Field(0, ge=0, le=1, description=f"GPU per Copilot worker. {_GPUS}")
    copilot_resources: MayChange[CustomResources] = Field(
        default_factory=dict, description=f"custom Ray resources per Copilot worker: {_PINS}"
    )
    copilot_threads: MayChange[Positive] = Field(1, description="torch threads per Copilot worker")
    placement: MayChange[Literal["pack", "spread"]] = Field(
        "pack", description="each model's workers on as few nodes as can be (pack), or on as many (spread)"
    )

    @model_validator(mode="after")
    def _can_be_placed(self) -> ResourcesSection:
        for who in ("pilot", "copilot"):
            workers, gpus = getattr(self, f"{who}_workers"), getattr(self, f"{who}_gpus")
            if workers > 1 and 0 < gpus <= 0.5:
                raise ValueError(
                    f"resources.{who}_gpus {gpus:g} lets two of {workers} workers share a GPU, which NCCL refuses: set it above "
                    f"0.5, or resources.{who}_workers=1"
                )
            for name in _RAYS_OWN:
                if name in getattr(self, f"{who}_resources"):
                    advice = f"set resources.{who}_{name.lower()}s" if name in ("CPU", "GPU") else "leave it out"
                    raise ValueError(f"resources.{who}_resources {name} is no custom resource: {advice}")
        return self


class RunConfig(Section):
    """A whole run. Sections and fields are documented by their `description`."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    pilot: PilotSection = Field(default_factory=PilotSection)
    log: LogSection = Field(default_factory=LogSection)
    copilot: CopilotSection = Field(default_factory=CopilotSection)
    fusion: MayChange[FusionSection] = Field(default_factory=FusionSection)
    tracking: MayChange[TrackingSection] = Field(default_factory=TrackingSection)
    callbacks: MayChange[CallbacksSection] = Field(default_factory=CallbacksSection)
    resources: ResourcesSection = Field(default_factory=ResourcesSection)
    serving: MayChange[ServingSection] = Field(default_factory=ServingSection)

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        for who, section in (("pilot", self.pilot), ("copilot", self.copilot)):
            workers = getattr(self.resources, f"{who}_workers")
            if section.batch_size < workers:
                raise ValueError(
                    f"{who}.batch_size {section.batch_size} must be at least resources.{who}_workers {workers}: "
                    "each takes a row of every batch"
                )
        if self.log.keep_rounds is not None and self.log.keep_rounds < self.copilot.buffer_rounds:
            raise ValueError(
                f"log.keep_rounds {self.log.keep_rounds} must be at least copilot.buffer_rounds "
                f"{self.copilot.buffer_rounds}: a restarted Copilot reads those again"
            )
        if self.copilot.schedule == "lockstep" and not self.log.enabled:
            raise ValueError("copilot.schedule lockstep needs log.enabled")
        return self

    @model_validator(mode="after")
    def _fewest_workers(self) -> RunConfig:
        least, most = self.resources.pilot_min_workers, self.resources.pilot_workers
        if least is not None and least > most:
            raise ValueError(f"resources.pilot_min_workers {least} must not be above resources.pilot_workers {most}")
        return self

    @model_validator(mode="after")
    def _packing_has_a_mask(self) -> RunConfig:
        if self.pilot.packing and self.model.attn_implementation not in (None, "sdpa", "eager"):
            raise ValueError(
                f"pilot.packing needs an attention that takes a mask: model.attn_implementation "
                f"{self.model.attn_implementation} must be sdpa or eager"
            )
        return self

    @model_validator(mode="after")
    def _quantized_weights_are_read(self) -> RunConfig:
        if self.pilot.quantization and self.model.random_weights:
            raise ValueError("pilot.quantization is for weights that are read: leave model.random_weights out")
        return self

    @model_validator(mode="after")
    def _gpus_compute_bf16(self) -> RunConfig:
        for section, gpus in ((self.pilot, self.resources.pilot_gpus), (self.copilot, self.resources.copilot_gpus)):
            if gpus and "dtype" not in section.model_fields_set:
                section.dtype = "bf16"
        return self

    @model_validator(mode="after")
    def _log_of_the_paper(self) -> RunConfig:
        given = self.log.model_fields_set
        if self.copilot.preset == "paper" and "top_k" not in given:
            self.log.top_k = PAPER_TOP_K
        if self.copilot.preset == "paper" and self.pilot.method == "full" and "question" not in given:
            self.log.question = "states"
        return self

    @model_validator(mode="after")
    def _items_to_rank(self) -> RunConfig:
        if self.fusion.metric == "ranking" and self.data.format != "sequences":
            raise ValueError("fusion.metric ranking needs data.format sequences: it ranks the items of those")
        return self

    def with_pilot_workers(self, count: int) -> RunConfig:
        """This config with another number of Pilot workers, from 1 to the batch's size."""
        resources = self.resources.model_copy(update={"pilot_workers": count})
        return self.model_copy(update={"resources": resources})

    @property
    def data_seed(self) -> int:
        """What the rows are cut and generated by."""
        return self.run.seed if self.data.seed is None else self.data.seed

    @property
    def log_location(self) -> str:
        """Folder or URI of the Mistake Log."""
        return self.log.path or str(self.run.path / "log")

    def public_dump(self) -> dict[str, Any]:
        """JSON-ready, with secrets struck out (storage options, addresses, what this process remembers as one): what is saved,
        tracked and printed."""
        dump: dict[str, Any] = _redacted(self.model_dump(mode="json"))
        dump["log"]["storage_options"] = _redacted(redact_options(self.log.storage_options))
        dump["data"] |= {name: getattr(self.data, name) for name in _TRAINED_TEXT}
        return dump

    def secrets(self) -> set[str]:
        """Values that no text of the run may hold."""
        return secrets_of(self.log.storage_options, self.tracking.uri, self.log.path)

    def secrets_to_give(self) -> list[str]:
        """Fields the run uses that hold a secret struck out in a saved config, which has to be given again."""
        addresses = {
            "log.path": self.log.path,
            "tracking.uri": self.tracking.uri if "mlflow" in self.tracking.targets else None,
        }
        addresses |= {f"log.storage_options.{name}": value for name, value in self.log.storage_options.items()}
        return [name for name, value in addresses.items() if value is not None and STRUCK_OUT in value]

    @property
    def row_tokens(self) -> int | None:
        """Tokens of a row that sequences of a Pilot's forward pass share; None: each has a row of its own."""
        return self.data.cutoff_tokens if self.pilot.packing else None

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of each worker in one round, however its rows divide (`data.prepared.split`)."""
        most_rows = -(-self.pilot.batch_size // self.resources.pilot_workers)
        return -(-most_rows // self.pilot.micro_batch_size)


def _redacted(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _redacted(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_redacted(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    # a local path is read again by its name, and a weak password may be a word of it
    is_path = "/" in tree and "://" not in tree
    return redact_address(tree if is_path else redact_known(tree))
