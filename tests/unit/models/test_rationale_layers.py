"""`log.rationale: all` or a list of layers: what the tap keeps, what the log stores of it, what the Copilot reads.

The reference is tests/support/family_reference.py: the library's `output_hidden_states`, the last layer run once more by hand.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.batch import batch_from_records, pooled_records
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.models.copilot import CopilotConfig
from tc_ray.models.families import family_of
from tc_ray.models.fusion.core import FusionError, check_fit
from tc_ray.models.pilot.step import PilotStep
from tc_ray.models.pilot.taps import LayerTap, pooled, tap_definition, tapped_layers
from tc_ray.pilot.engine import pilot_step
from tc_ray.pilot.record import check_log, log_metadata, to_records
from tests.support.family_reference import embedding_table, pilot_pass
from tests.support.family_samples import make_copilot, new_pilot, quiet, reference_model
from tests.support.reference_samples import close
from tests.support.tiny_families import ENCODER_DECODER, FAMILIES, VOCAB
from tests.support.tiny_model import make_tokenizer

quiet()

SHAPES = [(9, 8), (13, 1), (19, 6), (5, 3)]


def batch() -> dict[str, np.ndarray]:
    """As `TrainTable.batch`."""
    rng = np.random.default_rng(3)
    ids = np.zeros((len(SHAPES), max(length for length, _ in SHAPES)), np.int64)
    for row, (length, _) in enumerate(SHAPES):
        ids[row, :length] = rng.integers(2, VOCAB, length)
    lengths, starts = (np.array(column) for column in zip(*SHAPES, strict=True))
    return {"input_ids": ids, "lengths": lengths, "target_start": starts, "sample_id": np.arange(len(SHAPES))}


def config_of(family: str, **log: Any) -> RunConfig:
    positions = "target" if family in ENCODER_DECODER else "all"
    return RunConfig.model_validate({"log": {"top_k": 5, "positions": positions} | log})


def recorded(model: Any, config: RunConfig) -> Records:
    """Through the run's own step and conversion, without dropout."""
    given = batch()
    step = pilot_step(model.eval(), config).eval()
    tensors = [torch.from_numpy(given[name]) for name in ("input_ids", "lengths", "target_start")]
    record = step.measure(*tensors).record
    step.close()
    assert record is not None
    made, _ = to_records(record, given, np.zeros(len(SHAPES), np.int16), config.log, round=1, rank=0, attempt=1)
    made.validate()
    return made


def states(records: Records) -> torch.Tensor:
    return torch.from_numpy(records.rationale.view(np.int16)).view(torch.bfloat16).float()


@pytest.mark.parametrize("rationale", ["all", [0, 2], [1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_states_are_the_layers_outputs(family: str, rationale: Any) -> None:
    config, given = config_of(family, rationale=rationale), batch()
    records = recorded(new_pilot(family), config)
    count = family_of(reference_model(family)).layer_count(reference_model(family).config)
    layers = list(range(count)) if rationale == "all" else rationale
    assert records.rationale_layers == len(layers)
    for row, (length, start) in enumerate(SHAPES):
        ids = given["input_ids"][row].tolist()
        seen = pilot_pass(reference_model(family), ids[:start], ids[start : length - 1])
        span = slice(records.rationale_offsets[row], records.rationale_offsets[row + 1])
        expected = seen.layers[layers].transpose(0, 1)
        assert states(records)[span].shape == expected.shape
        for number in range(len(layers)):  # the layers' sizes differ: each against its own
            close(states(records)[span][:, number], expected[:, number], 2**-8)


@pytest.mark.parametrize("pooling", ["mean", "max", "sum"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "flan_t5"])
def test_pooled_later_is_pooled_at_once(family: str, pooling: str) -> None:
    """Bit for bit for a Pilot in bfloat16, whose states the log keeps exactly; over all layers and over a few."""
    model = new_pilot(family, dtype=torch.bfloat16)
    at_once = recorded(model, config_of(family, pooling=pooling))
    later = pooled_records(recorded(model, config_of(family, pooling=pooling, rationale="all")), pooling)
    assert later.rationale_layers == 1
    np.testing.assert_array_equal(later.rationale, at_once.rationale)
    assert pooled_records(at_once, pooling) is at_once
    given = batch()
    tensors = [torch.from_numpy(given[name]) for name in ("input_ids", "lengths", "target_start")]
    step = PilotStep(model, top_k=3, pooling=pooling, layers=[0, 2])
    record = step.measure(*tensors).record
    step.close()
    few = pooled_records(recorded(model, config_of(family, pooling=pooling, rationale=[0, 2])), pooling)
    from_log = batch_from_records(few)
    assert record is not None
    for row in range(len(SHAPES)):
        at = from_log.rationale_position[row]
        real = at >= 0
        assert torch.equal(from_log.rationale[row, real], record.rationale[row, at[real]].bfloat16())


def test_pooling_of_one_layer_is_that_layer() -> None:
    torch.manual_seed(0)
    one = torch.randn(5, 1, 4)
    for pooling in ("mean", "max", "sum"):
        assert torch.equal(pooled(one, pooling), one[:, 0])


def test_a_tap_hands_its_states_over_once() -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    tap = LayerTap(list(layers), "none", [0, 2])
    x = torch.randn(1, 2, 4)
    with tap.recording():
        outputs = [layer(x) for layer in layers]
    assert torch.equal(tap.take(), torch.stack([outputs[0], outputs[2]], 2))
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.take()
    layers[0](x)  # not recorded
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.take()


@pytest.mark.parametrize("rationale", [[], [0, 4], [1, 0], [1, 1], [-1]])
def test_layers_that_cannot_be_tapped(rationale: list[int]) -> None:
    with pytest.raises(ValueError, match=r"log.rationale .* it has 4 decoder layers, 0 to 3"):
        tapped_layers(rationale, 4)


def test_definitions_differ_where_the_states_do() -> None:
    assert tap_definition() == "mean over decoder layers 1..L of the layer output, before the final norm"
    assert tap_definition("max", [0, 3]) == (
        "max over decoder layers 0, 3 (counted from 0) of the layer output, before the final norm"
    )
    assert tap_definition("none").startswith("each of decoder layers 1..L")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_metadata(family: str) -> None:
    shape, tokenizer = reference_model(family).config, make_tokenizer()
    count = family_of(shape).layer_count(shape)

    def of(**log: Any) -> LogMetadata:
        return log_metadata(config_of(family, **log), shape, tokenizer)

    plain = of()
    assert (plain.pooling, plain.rationale_layers, plain.layers, plain.top_k, plain.error) == (
        "mean",
        1,
        "all",
        5,
        "top-k",
    )
    assert of(top_k=10**6).top_k == shape.vocab_size - 1
    everything = of(rationale="all", error="dense")
    assert (everything.pooling, everything.rationale_layers, everything.layers) == ("none", count, "all")
    assert (everything.error, everything.top_k) == ("dense", shape.vocab_size - 1)
    few = of(rationale=[0, 2], pooling="max")
    assert (few.pooling, few.rationale_layers, few.layers) == ("none", 2, "0,2")
    assert len({m.tap for m in (plain, everything, few)}) == 3
    assert plain.question == ("states" if family == "t5" else "ids")
    with pytest.raises(ValueError, match="decoder layers"):
        of(rationale=[99])
    with pytest.raises(ValueError, match=r"set log\.positions=target"):
        check_log(config_of("t5", positions="all"), reference_model("t5").config)
    if family == "llama":
        assert check_log(config_of("llama", rationale=[1]), shape) == [1]


def test_a_copilot_of_some_layers_says_so_and_wants_them(tmp_path: Any) -> None:
    copilot, _ = make_copilot("llama", tap_layers=[0, 2], pooling="max")
    assert copilot.config.tap == tap_definition("max", [0, 2])
    copilot.config.save_pretrained(tmp_path)
    loaded = CopilotConfig.from_pretrained(tmp_path)
    assert loaded.tap_layers == [0, 2]
    shape = reference_model("llama").config
    check_fit(shape, loaded)
    loaded.tap_layers = None  # then the words do not fit
    with pytest.raises(FusionError, match="other hidden states"):
        check_fit(shape, loaded)
    deep = SimpleNamespace(**vars(loaded) | {"tap_layers": [0, 7], "tap": tap_definition("max", [0, 7])})
    deep.decoder_config = loaded.decoder_config
    with pytest.raises(FusionError, match=r"layers \[0, 7\], from 0; this Pilot has 4 layers"):
        check_fit(shape, deep)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_question_of_the_round_is_kept_where_asked(family: str) -> None:
    """`log.question: states`: the token embeddings of the prompts as the layers see them, through the record to the batch."""
    assert recorded(new_pilot(family), config_of(family)).question is None
    config = config_of(family, question="states")
    made = batch_from_records(recorded(new_pilot(family), config))
    assert made.question is not None
    expected = embedding_table(reference_model(family))[made.question_ids].bfloat16()
    assert torch.equal(made.question[made.question_mask], expected[made.question_mask])
    assert not made.question[~made.question_mask].any()
