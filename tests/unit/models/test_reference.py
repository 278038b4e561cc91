"""The real path (batched, hooked, sparse, cached, through Parquet) against the reference of tests/support/reference.py.

Tolerance where none is given: 1e-5 relative to the largest entry. Both sides are float32 and add the same numbers in another
order (padded batches against single rows, one softmax kernel against a loop), which costs a few units in the 7th digit;
a wrong mask, shift or position shows in the first.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.copilot.batch import batch_from_records
from tc_ray.data.prepared.batches import collate
from tc_ray.mistakelog.rows.records import Records
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.fusion import FusedModel
from tc_ray.models.fusion.core import FusionError
from tc_ray.models.losses import RootMeanSquare
from tc_ray.models.pilot.load import load_pilot
from tc_ray.models.pilot.step import PilotStep, sparse_errors
from tests.support.reference import copilot_f, fused_decoding, rmse
from tests.support.reference_samples import dense_errors
from tests.support.tiny_model import make_tiny_llama

VOCAB = 258
WIDTH = 32
END = 1
# one target, many targets, one prompt token, the longest in the middle of the batch
SHAPES = [(9, 8), (12, 1), (17, 6), (5, 3)]


from tests.support.reference_samples import close, examples, logged, make_copilot, shaken, states_of


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama", scale=4.0)
    model = load_pilot(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(8.0)  # peaked distributions, as a trained model has
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pilot(model_folder: Path) -> Any:
    return load_pilot(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["same", "few", "narrow"])
def copilot(request: pytest.FixtureRequest, model_folder: Path, pilot: Any, tmp_path_factory: Any) -> Copilot:
    return make_copilot(request.param, model_folder, pilot, tmp_path_factory.mktemp("copilot"))


# -- records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "target"])
def test_records_are_the_reference_s(pilot: Any, tmp_path: Path, positions: str) -> None:
    records, expected = logged(pilot, tmp_path / "log", top_k=7, positions=positions)
    assert len(records) == len(SHAPES)
    exact_bits = []
    for i, (row, dense) in enumerate(zip(examples(), expected, strict=True)):
        length, start = len(row["input_ids"]), row["target_start"]
        span = slice(records.target_offsets[i], records.target_offsets[i + 1])
        ids = torch.from_numpy(records.error_ids[span]).long()
        values = torch.from_numpy(records.error_values[span])
        assert records.sample_id[i] == row["sample_id"]
        assert records.input_ids[records.seq_offsets[i] : records.seq_offsets[i + 1]].tolist() == row["input_ids"]
        assert ids[:, 0].tolist() == row["input_ids"][start:]
        p = dense.logits.softmax(-1)
        for n in range(length - start):
            others = p[n].clone()
            others[row["input_ids"][start + n]] = -1.0
            assert ids[n, 1:].tolist() == others.topk(7).indices.tolist()
            # listed entries, one by one: each has its own magnitude
            torch.testing.assert_close(values[n], dense.errors[n, ids[n]], rtol=1e-5, atol=1e-7)
            unlisted = torch.ones(VOCAB, dtype=torch.bool)
            unlisted[ids[n]] = False
            assert float(records.error_rest[span][n]) == pytest.approx(float(p[n, unlisted].sum()), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(torch.from_numpy(records.token_loss[span]), dense.token_loss, rtol=1e-5, atol=1e-6)
        ranked_first = (p.argmax(-1) == torch.tensor(row["input_ids"][start:])).tolist()
        assert records.token_correct[span].tolist() == ranked_first
        first = 0 if positions == "all" else start - 1
        states, exact = states_of(records, i), dense.states[first : length - 1]
        assert states.shape == exact.shape
        # stored as bfloat16: half a unit of its last place, and float32 noise on top
        half_unit = torch.exp2(exact.abs().log2().floor() - 8)
        assert bool(((states - exact).abs() <= half_unit * 1.001 + 1e-6).all())
        exact_bits.append((states == exact.bfloat16().float()).float().mean())
    # equal bits but for the rare entry that float32 noise moves over the middle between two bfloat16 numbers
    assert float(torch.stack(exact_bits).mean()) > 0.995


def test_error_values_are_the_same_with_every_token_listed(pilot: Any, tmp_path: Path) -> None:
    """k >= V - 1 keeps the dense error: nothing rests."""
    records, expected = logged(pilot, tmp_path / "log", top_k=10 * VOCAB)
    ids, values = torch.from_numpy(records.error_ids).long(), torch.from_numpy(records.error_values)
    dense = dense_errors(ids, values, VOCAB)
    torch.testing.assert_close(dense, torch.cat([e.errors for e in expected]), rtol=1e-5, atol=1e-7)
    assert float(records.error_rest.max()) < 1e-6
    assert float(dense.sum(1).abs().max()) < 1e-5


def test_gradient_checkpointing_changes_no_record(model_folder: Path, tmp_path: Path) -> None:
    """The recomputation in backward must not be recorded a second time, nor change the states."""
    made = []
    for checkpointing in (False, True):
        model = load_pilot(model_folder, dtype=torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        step = PilotStep(model, top_k=5).train()
        batch = collate(examples(), 0)
        inputs = [torch.from_numpy(batch[name]) for name in ("input_ids", "lengths", "target_start")]
        loss, record = step(*inputs, 1.0)
        loss.backward()
        _, again = step(*inputs, 1.0)  # a tap that heard the backward pass would now hold too much
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        made.append((record, again, gradients))
    for one, other in zip(made[0][0], made[1][0], strict=True):
        for a, b in zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]:
            assert a is b is None or torch.equal(a, b)
    assert torch.equal(made[1][0].rationale, made[1][1].rationale)
    close(made[1][2], made[0][2], 1e-5)


# -- the Copilot --------------------------------------------------------------------------------------------------


def reference_f(copilot: Copilot, records: Records, i: int, errors: torch.Tensor) -> torch.Tensor:
    """f of record i as logged, by the reference."""
    ids = records.input_ids[records.seq_offsets[i] : records.seq_offsets[i + 1]].tolist()
    start, length = int(records.target_start[i]), len(ids)
    states = states_of(records, i)
    positions = list(range(length - 1 - len(states), length - 1))
    return copilot_f(copilot, ids[:start], states, positions, list(range(start - 1, length - 1)), errors)


@pytest.mark.parametrize(("top_k", "positions"), [(VOCAB, "all"), (6, "all"), (6, "target")])
def test_copilot_f_loss_and_gradients(copilot: Copilot, pilot: Any, tmp_path: Path, top_k: int, positions: str) -> None:
    records, _ = logged(pilot, tmp_path / "log", top_k=top_k, positions=positions)
    batch = batch_from_records(records)
    copilot.zero_grad()
    f = copilot.compact(batch)
    ids, values = batch.error_ids[batch.row_mask], batch.error_values[batch.row_mask]
    total = RootMeanSquare().total(copilot.states(batch), copilot.output.weight, copilot.output_places(ids), values)
    loss = (total / len(f)).sqrt().float()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in copilot.named_parameters() if p.requires_grad}

    copilot.zero_grad()
    dense = dense_errors(ids, values, VOCAB)
    parts = dense.split(np.diff(records.target_offsets).tolist())
    expected = torch.cat([reference_f(copilot, records, i, part) for i, part in enumerate(parts)])
    expected_loss = rmse(expected, dense)
    expected_loss.backward()
    close(copilot.expand(f), expected)
    with torch.no_grad():
        close(copilot(batch), expected)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert gradients.keys() == {name for name, p in copilot.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        wanted = dict(copilot.named_parameters())[name].grad
        assert wanted is not None and float(wanted.abs().max()) > 0, f"{name} has no influence: nothing is compared"
        close(gradient, wanted, 2e-5)  # one factor more than f: a product of two sums of that tolerance


def test_sparse_and_dense_error_rows_agree(copilot: Copilot) -> None:
    torch.manual_seed(0)
    log_probs = (4 * torch.randn(11, VOCAB)).log_softmax(-1)
    sparse = sparse_errors(log_probs, torch.randint(0, VOCAB, (11,)), VOCAB - 1)
    rows = copilot.error_rows(sparse.ids, sparse.values)
    dense = dense_errors(sparse.ids, sparse.values, VOCAB)
    close(rows, dense @ copilot.error_table @ copilot.error_projection.weight.T)


@pytest.mark.parametrize("positions", ["all", "target"])
def test_batch_made_without_the_log_is_the_log_s(pilot: Any, tmp_path: Path, positions: str) -> None:
    """Held-out measures build their Copilot batch directly; it must be what the log would give back."""
    records, _ = logged(pilot, tmp_path / "log", top_k=6, positions=positions)
    from_log = batch_from_records(records)
    data = {k: torch.from_numpy(v) for k, v in collate(examples(), 0).items()}
    out = PilotStep(pilot, top_k=6).measure(data["input_ids"], data["lengths"], data["target_start"])
    assert out.record is not None
    direct = CopilotBatch.from_step(
        out.record, data["input_ids"], data["lengths"], data["target_start"], positions=positions
    )
    copilot = shaken(Copilot.from_decoder(pilot.name_or_path, [0, 1], pilot=pilot))
    assert torch.equal(direct.row_position, from_log.row_position)
    with torch.no_grad():
        close(copilot(direct), copilot(from_log))


# -- fused decoding -----------------------------------------------------------------------------------------------


def prompts(seed: int = 11) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, length).tolist() for length in (7, 12, 4)]


def fused_by_steps(fused: FusedModel, prompt: list[int], forced: list[int], lam: float) -> list[torch.Tensor]:
    """Fused logits of each step by the cached real path, fed with given tokens."""
    cache = fused.new_cache()
    given = torch.tensor([prompt])
    logits = []
    for token in forced:
        logits.append(fused(given, past_key_values=cache, lam=lam).logits[0, -1])
        given = torch.tensor([[token]])
    return logits


@pytest.mark.parametrize("space", ["probability", "logits"])
@pytest.mark.parametrize("feedback", ["own", "realised"])
def test_fused_logits_step_by_step(copilot: Copilot, pilot: Any, space: str, feedback: str) -> None:
    fused = FusedModel.join(pilot, copilot, space=space, feedback=feedback)
    prompt, forced = prompts()[0], [40, 2, 177, 200, 33, 8, 250, 91]
    lam = 0.7 if space == "probability" else 2.0
    got = fused_by_steps(fused, prompt, forced, lam)
    _, expected = fused_decoding(
        pilot, copilot, prompt, steps=len(forced), lam=lam, space=space, feedback=feedback, forced=forced
    )
    for step, (one, other) in enumerate(zip(got, expected, strict=True)):
        if space == "logits":
            close(one, other)
        else:
            # an entry clamped to 0 on one side may be 1e-9 on the other: logs are compared as the probabilities they are
            close(one.exp(), other.exp())
            large = other.exp() > 1e-4
            torch.testing.assert_close(one[large], other[large], rtol=0, atol=1e-3)
        assert int(one.argmax()) == int(other.argmax()), step


@pytest.mark.parametrize("space", ["probability", "logits"])
@pytest.mark.parametrize("feedback", ["own", "realised"])
def test_generated_tokens_are_the_reference_s(copilot: Copilot, pilot: Any, space: str, feedback: str) -> None:
    """Exactly, for every prompt alone and in one left-padded batch; the correction does change what is said."""
    fused = FusedModel.join(pilot, copilot, space=space, feedback=feedback)
    lam, steps = (0.8 if space == "probability" else 3.0), 10
    width = max(len(p) for p in prompts())
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts()])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts()])
    batch = fused.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, lam=lam)
    changed = 0
    for row, prompt in enumerate(prompts()):
        wanted, _ = fused_decoding(
            pilot, copilot, prompt, steps=steps, lam=lam, space=space, feedback=feedback, end=END
        )
        alone = fused.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, lam=lam)
        assert alone[0, len(prompt) :].tolist() == wanted
        assert batch[row, width : width + len(wanted)].tolist() == wanted
        plain = pilot.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False)
        changed += plain[0, len(prompt) :].tolist() != wanted
    assert changed, "the Copilot changed nothing: the comparison proves nothing"


def test_lambda_zero_is_the_pilot(copilot: Copilot, pilot: Any) -> None:
    fused = FusedModel.join(pilot, copilot, lam=0.9)
    for prompt in prompts():
        ids = torch.tensor([prompt])
        plain = pilot.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(fused.generate(ids, max_new_tokens=12, do_sample=False, lam=0.0), plain)
        # one row with lambda 0 beside a corrected row
        both = fused.generate(ids.repeat(2, 1), max_new_tokens=12, do_sample=False, lam=torch.tensor([0.0, 0.9]))
        assert both[0].tolist()[: plain.shape[1]] == plain[0].tolist()
        assert torch.equal(fused(ids, lam=0.0).logits[:, -1], pilot(ids, logits_to_keep=1).logits[:, -1])


def test_sampling_with_lambda_zero_is_the_pilot_s(copilot: Copilot, pilot: Any) -> None:
    fused = FusedModel.join(pilot, copilot)
    ids = torch.tensor([prompts()[1]])
    made = {}
    for name, model, extra in (
        ("pilot", pilot, {}),
        ("zero", fused, {"lam": 0.0}),
        ("one", fused, {"lam": 0.9}),
        ("again", fused, {"lam": 0.9}),
    ):
        torch.manual_seed(21)
        out = model.generate(ids, max_new_tokens=12, do_sample=True, temperature=0.9, top_p=0.95, **extra)
        made[name] = out[0].tolist()
    assert made["zero"] == made["pilot"]
    assert made["one"] == made["again"]
    assert made["one"] != made["pilot"]


def test_lambda_cannot_start_in_mid_sequence(copilot: Copilot, pilot: Any) -> None:
    """The Copilot needs the prompt: joining later must be an error, not a wrong answer."""
    fused = FusedModel.join(pilot, copilot)
    cache = fused.new_cache()
    fused(torch.tensor([prompts()[0]]), past_key_values=cache, lam=0.0)
    with pytest.raises(RuntimeError, match="joins at the prompt"):
        fused(torch.tensor([[5]]), past_key_values=cache, lam=0.5)


def test_saved_and_loaded_answers_the_same(copilot: Copilot, pilot: Any, tmp_path: Path) -> None:
    fused = FusedModel.join(pilot, copilot, lam=0.6, space="logits", feedback="realised")
    fused.save_pretrained(tmp_path / "export")
    back = FusedModel.from_pretrained(tmp_path / "export")
    assert (back.default_lam, back.space, back.feedback) == (0.6, "logits", "realised")
    for (name, old), (new_name, new) in zip(fused.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == new_name and torch.equal(old, new), name
    ids = torch.tensor([prompts()[1]])
    one, other = (m.generate(ids, max_new_tokens=10, do_sample=False) for m in (fused, back))
    assert torch.equal(one, other)
    assert list((tmp_path / "export" / "copilot").glob("*.safetensors"))


def test_export_that_is_not_whole_is_named(copilot: Copilot, pilot: Any, tmp_path: Path) -> None:
    fused = FusedModel.join(pilot, copilot)
    fused.save_pretrained(tmp_path)
    (tmp_path / "copilot" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"copilot/config\.json"):
        FusedModel.from_pretrained(tmp_path)


def test_a_copilot_of_another_pilot_is_refused(copilot: Copilot, model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_folder)
    config.hidden_size, config.head_dim = 40, 10
    with pytest.raises(FusionError, match="a Pilot of width 32; this Pilot has 40"):
        FusedModel.join(AutoModelForCausalLM.from_config(config), copilot)
    strange = SimpleNamespace(config=SimpleNamespace(tap="after the final norm", pooling="mean", tap_layers=None))
    with pytest.raises(FusionError, match="trained on other hidden states"):
        FusedModel.join(load_pilot(model_folder, dtype=torch.float32), strange)  # type: ignore[arg-type]
