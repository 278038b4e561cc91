"""The `pilot` and `copilot` sections: how the two models are trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tc_ray.config.section import Fraction, MayChange, NonNegative, Positive, Section

_METHOD = "lora: train adapters on frozen weights; full: train all weights"
_WARMUP = "share of the steps in which the learning rate rises from 0 to its peak"
_SCHEDULE = "the learning rate after the warm-up: to 0 along a cosine or a line, or constant at its peak"
Schedule = Literal["cosine", "linear", "constant"]
_DECAY = "weight decay of AdamW"
_CLIP = "gradients are scaled down to this norm"
PAPER_TOP_K = 256
"""`log.top_k` of a Copilot of the paper's form; the paper's errors are dense. 64 leave out less than 1e-4 of the squared mass."""
PAPER_FORM: dict[str, Any] = {
    "pattern": "alternate",
    "loss": "rmse",
    "output_tokens": "all",
    "producing_state": "unseen",
    "row_positions": False,
    "error_input": "free",
    "start_row": "zeros",
    "memory_norm": False,
    "scaled_output": False,
}
"""Fields of the `copilot` section that `copilot.preset: paper` sets: sections 3.1 and E.2 to the letter."""
_DTYPE = "default: bf16 on a GPU (resources) or on a processor with instructions for it, else fp32"


def fast_dtype() -> Literal["bf16", "fp32"]:
    """The type that this machine's processor computes fast: bf16 without instructions for it takes 12 times as long."""
    cpu = Path("/proc/cpuinfo")
    return "bf16" if cpu.exists() and re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", cpu.read_text()) else "fp32"


class LoraSection(Section):
    """Low-rank adapters (peft)."""

    rank: Positive = Field(16, description="rank of an adapter's two matrices")
    alpha: Positive = Field(32, description="an adapter's output is scaled by alpha / rank")
    dropout: Fraction = Field(0.05, description="dropout of an adapter's input")
    target_modules: list[str] | None = Field(
        None,
        description="module names to adapt; null: the attention and feed-forward projections of the model's family",
    )
    first_layer: NonNegative = Field(0, description="adapt decoder layers from this one on (0: all)")


class PilotSection(Section):
    """Fine-tuning of the Pilot (Ray Train + DeepSpeed)."""

    method: Literal["lora", "full"] = Field("lora", description=_METHOD)
    lora: LoraSection = Field(default_factory=LoraSection)
    quantization: Literal["nf4"] | None = Field(
        None,
        description="nf4: the frozen weights under the adapters in 4 bits (QLoRA), for method lora and zero_stage below 3; needs "
        "bitsandbytes (pip install tc-ray[qlora]). What is exported are the weights that were trained on, in full",
    )
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description=_DECAY)
    warmup_ratio: Fraction = Field(0.03, description=_WARMUP)
    lr_schedule: Schedule = Field("cosine", description=_SCHEDULE)
    epochs: Positive = Field(1, description="passes over the training rows")
    max_rounds: Positive | None = Field(None, description="stop after this many rounds; default: the epochs' rounds")
    batch_size: Positive = Field(16, description="examples per round, over all workers")
    micro_batch_size: MayChange[Positive] = Field(
        16, description="most examples of one forward pass; a worker's share of a round is cut as evenly as it can be"
    )
    packing: bool = Field(
        False,
        description="put several short examples of a forward pass into one row of data.cutoff_tokens at most, where each sees itself "
        "alone: less padding; decoder-only Pilots with attention sdpa or eager",
    )
    zero_stage: MayChange[Literal[0, 1, 2, 3]] = Field(
        1,
        description="what DeepSpeed ZeRO divides among the workers: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too",
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default_factory=fast_dtype, description=f"type of the weights and of computing; {_DTYPE}"
    )
    max_grad_norm: float = Field(1.0, gt=0, description=_CLIP)
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    checkpoint_every_rounds: MayChange[Positive] = Field(50, description="rounds between two checkpoints")
    keep_checkpoints: MayChange[Positive] = Field(2, description="checkpoints kept, the newest")
    max_failures: MayChange[int] = Field(
        3, ge=-1, description="restarts of the worker group before the run fails; -1: no limit"
    )
    validate_every: Positive | None = Field(
        None,
        description="rounds between two measurements of the NLL on validation rows, and one after the last round; null: none",
    )
    validation_rows: Positive = Field(
        256, description="rows that such a measurement takes at most, spread evenly over the validation rows"
    )
    patience: Positive | None = Field(
        None,
        description="the Pilot ends when so many measurements in a row found no lower NLL, as if that round had been the last; "
        "null: never early",
    )
    final: Literal["last", "best"] = Field(
        "last",
        description="weights that are evaluated and exported: of the last round, or of the round with the lowest NLL on validation "
        "rows, whose checkpoint is then made and kept",
    )

    @model_validator(mode="after")
    def _quantizes_what_is_frozen(self) -> PilotSection:
        if self.quantization and self.method == "full":
            raise ValueError("quantization nf4 is for weights that stay as they are: set method to lora")
        if self.quantization and self.zero_stage == 3:
            raise ValueError("quantization nf4 cannot be divided among workers: set zero_stage to 2, 1 or 0")
        return self

    @model_validator(mode="after")
    def _measures_what_it_ends_by(self) -> PilotSection:
        if self.validate_every is None and (self.patience is not None or self.final == "best"):
            name = "patience" if self.patience is not None else "final best"
            raise ValueError(f"{name} goes by the NLL on validation rows: set validate_every to the rounds between two")
        return self


class CopilotLoraSection(LoraSection):
    """Low-rank adapters of the Copilot's decoder layers (paper: rank 32, alpha 64, dropout 0.08)."""

    rank: Positive = Field(32, description="rank of an adapter's two matrices")
    alpha: Positive = Field(64, description="an adapter's output is scaled by alpha / rank")
    dropout: Fraction = Field(0.08, description="dropout of an adapter's input")


class CopilotSection(Section):
    """The Copilot and its asynchronous training."""

    preset: Literal["paper"] | None = Field(
        None,
        description="paper: the Copilot's form as the paper has it, in every field that is not set beside it: "
        f"{', '.join(f'{name} {str(value).lower()}' for name, value in PAPER_FORM.items())}; and log.top_k {PAPER_TOP_K}, log.question states with pilot.method full",
    )
    layers: list[int] | None = Field(None, description="layers of the base model to start from; null: by every")
    every: Positive = Field(1, description="take every k-th layer, counted so that the last layer is among them")
    method: Literal["lora", "full"] = Field("full", description=_METHOD)
    lora: CopilotLoraSection = Field(default_factory=CopilotLoraSection)
    pattern: Literal["alternate", "early", "late", "all"] = Field(
        "alternate",
        description="layers of a decoder-only Copilot that attend to the Pilot instead of to earlier rows (table 18): every "
        "second one, the first half, the last half, or all",
    )
    loss: Literal["rmse", "kl", "cross_entropy"] = Field(
        "rmse", description="between f and the logged error (equation 7; table 20 compares the three)"
    )
    output_tokens: Literal["targets", "all"] = Field(
        "targets", description="tokens the Copilot can correct: those that occur in training completions, or all of V"
    )
    producing_state: Literal["input", "memory", "unseen"] = Field(
        "input",
        description="the Pilot's hidden state that produced token i is, for row i: added to its input and in its memory; in "
        "its memory only; or unseen, as in the paper, where row i sees the states of earlier tokens",
    )
    row_positions: bool = Field(
        True, description="rows have the family's positions, rotary or relative; false: none (paper)"
    )
    error_input: Literal["embedding", "free"] = Field(
        "embedding",
        description="W_in, which reads the errors: a trained matrix over the frozen token embedding, or a free layer V -> d "
        "(paper)",
    )
    start_row: Literal["learned", "zeros"] = Field(
        "learned", description="input row 0, before which there is no error: a trained vector, or zeros (paper)"
    )
    memory_norm: bool = Field(
        True, description="normalise what the Pilot gives before it is attended to; false: it is read as it is (paper)"
    )
    scaled_output: bool = Field(
        True, description="scale final states by 1/sqrt(width) before W_out; false: f = W_out state (paper)"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description=_DECAY)
    warmup_ratio: Fraction = Field(0.03, description=_WARMUP)
    lr_schedule: Schedule = Field("cosine", description=_SCHEDULE)
    max_grad_norm: float = Field(1.0, gt=0, description=_CLIP)
    batch_size: Positive = Field(16, description="records per Copilot step, over all learner workers")
    steps_per_round: Positive = Field(3, description="Copilot steps for each Pilot round")
    buffer_rounds: Positive = Field(128, description="most recent rounds that a batch is drawn from (paper A.3)")
    dtype: Literal["bf16", "fp32"] = Field(
        default_factory=fast_dtype, description=f"type of computing; weights and optimizer stay fp32; {_DTYPE}"
    )
    schedule: Literal["async", "lockstep"] = Field(
        "async", description="lockstep: the Pilot waits for the Copilot after each round (a test mode)"
    )
    checkpoint_every_steps: MayChange[Positive] = Field(100, description="Copilot steps between two checkpoints")
    max_restarts: MayChange[int] = Field(
        3, ge=0, description="restarts of the learner group before the Copilot is given up"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_preset(cls, values: Any) -> Any:
        return PAPER_FORM | values if isinstance(values, dict) and values.get("preset") == "paper" else values

    def form(self) -> dict[str, Any]:
        """The fields that shape the model, as `CopilotConfig` names them."""
        names = (
            "pattern",
            "producing_state",
            "row_positions",
            "error_input",
            "start_row",
            "memory_norm",
            "scaled_output",
        )
        return {name: getattr(self, name) for name in names}
