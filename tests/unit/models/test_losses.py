"""The Copilot's losses against a slow dense reference in float64, and what they must not hold in memory.

The reference writes f and l out over the whole vocabulary, one row at a time, and leaves the gradients to autograd.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tc_ray.copilot.learner import Learner
from tc_ray.models.losses import BLOCK_ELEMENTS, LOSSES, Outputs, RootMeanSquare, TokenLoss, inner_products
from tests.support.tiny_model import make_tiny_llama
from tests.unit.copilot.test_learner import make_batch, make_copilot, section


class Sample(NamedTuple):
    """Arguments of `TokenLoss.total`."""

    states: torch.Tensor
    weight: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor

    def to(self, dtype: torch.dtype) -> Sample:
        return self._replace(states=self.states.to(dtype), weight=self.weight.to(dtype))


def sample(tokens: int, width: int, outputs: int, listed: int, *, irregular: bool = True, seed: int = 0) -> Sample:
    """Errors of peaked random distributions, f of a few tenths.

    `irregular`: every third row has its true token and another outside the output, others one; all have a zero, as padding
    has.
    """
    make = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, width, generator=make)
    weight = 0.3 * torch.randn(outputs, width, generator=make) / width**0.5
    p = (3 * torch.randn(tokens, outputs, generator=make)).softmax(-1)
    truth = torch.randint(0, outputs, (tokens, 1), generator=make)
    rest = p.scatter(1, truth, -1.0).topk(listed - 1).indices
    places = torch.cat([truth, rest], 1)
    values = torch.cat([1 - p.gather(1, truth), -p.gather(1, rest)], 1)
    if irregular:
        places[::3, 0] = -1
        if listed > 5:
            places[1::3, 2] = -1
            places[::3, 5] = -1
            values[:, 3] = 0.0
    return Sample(states, weight, places, values)


SHAPES = {
    "N < d": (5, 16, 40, 6),
    "N > d": (70, 8, 40, 6),
    "k = 0": (9, 8, 40, 1),
    "all listed": (12, 8, 30, 30),
    "several blocks, N < d": (50, 60, 45_000, 6),
    "several blocks, N > d": (9000, 4, 600, 6),
}
VOCAB = 45_100


def reference(kind: str, given: Sample, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S, dS/dH, dS/dW from f and l over the whole vocabulary, row by row: the output tokens first, then the others."""
    h, w = (x.detach().double().requires_grad_() for x in given[:2])
    outputs = len(w)
    total = torch.zeros((), dtype=torch.float64)
    for state, places, values in zip(h, given.places.tolist(), given.values.double().tolist(), strict=True):
        f = torch.cat([w @ state, torch.zeros(vocab_size - outputs, dtype=torch.float64)])
        # an unreachable entry is a token of its own among those that f cannot reach
        columns = [outputs + j if place < 0 else place for j, place in enumerate(places)]
        error = torch.zeros(vocab_size, dtype=torch.float64)
        for column, value in zip(columns, values, strict=True):
            error[column] += value
        if kind == "kl":
            total = total + (error.softmax(0) * (error.log_softmax(0) - f.log_softmax(0))).sum()
        elif kind == "cross_entropy":
            total = total - f.log_softmax(0)[columns[0]]
        else:
            total = total + (f - error).square().sum()
    total.backward()
    assert h.grad is not None and w.grad is not None
    return total.detach(), h.grad, w.grad


def measured(loss: TokenLoss, given: Sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, w = (x.detach().clone().requires_grad_() for x in given[:2])
    total = loss.total(h, w, given.places, given.values)
    assert total.dtype == torch.float64
    total.backward()
    assert h.grad is not None and w.grad is not None
    assert (h.grad.dtype, w.grad.dtype) == (h.dtype, w.dtype)
    return total.detach(), h.grad, w.grad


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference against the largest entry."""
    assert got.shape == wanted.shape
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_the_dense_ones(kind: str, shape: str) -> None:
    tokens, width, outputs, listed = SHAPES[shape]
    given = sample(tokens, width, outputs, listed)
    blocks = math.ceil(outputs / Outputs(*given[:2], product=torch.float32, wide=torch.float32).columns)
    assert (blocks > 1) == shape.startswith("several")
    vocab_size = VOCAB if outputs > 1000 else outputs + 40
    loss = LOSSES[kind](vocab_size)
    total, d_states, d_weight = reference(kind, given, vocab_size)
    got = measured(loss, given)
    assert float(total) > 0
    assert float(got[0]) == pytest.approx(float(total), rel=1e-5)
    assert off(got[1], d_states) < 1e-5
    assert off(got[2], d_weight) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_inner_products_are_those_of_the_dense_errors(shape: str) -> None:
    """And give the rmse's sum of lam f in place of f, for every lam."""
    tokens, width, outputs, listed = SHAPES[shape]
    given = sample(tokens, width, outputs, listed)
    own, across, squares = inner_products(*given).tolist()
    for lam in (0.0, 0.3, 1.0, 2.0):
        scaled = given._replace(weight=lam * given.weight)
        total, _, _ = reference("rmse", scaled, VOCAB if outputs > 1000 else outputs + 40)
        assert own - 2 * lam * across + lam * lam * squares == pytest.approx(float(total), rel=1e-5)
        assert float(RootMeanSquare().total(*scaled)) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_output_of_the_whole_vocabulary(kind: str) -> None:
    """No token is outside: nothing is added to Z_f, and log 0 makes no NaN."""
    given = sample(20, 8, 60, 6, irregular=False)
    loss = LOSSES[kind](60)
    for got, wanted in zip(measured(loss, given), reference(kind, given, 60), strict=True):
        assert off(got, wanted) < 1e-5


@pytest.mark.parametrize("kind", LOSSES)
def test_same_loss_with_fewer_outputs(kind: str) -> None:
    """f on 30 tokens is f on all 80 with zero rows for the rest."""
    given = sample(20, 8, 30, 6)
    places = torch.where(given.places < 0, 30 + torch.arange(6), given.places)
    whole = Sample(given.states, torch.cat([given.weight, torch.zeros(50, 8)]), places, given.values)
    loss = LOSSES[kind](80)
    few, all_ = measured(loss, given), measured(loss, whole)
    assert float(few[0]) == pytest.approx(float(all_[0]), rel=1e-6)
    assert off(few[2], all_[2][:30].double()) < 1e-5


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_in_double_precision(kind: str) -> None:
    given = sample(7, 5, 20, 6).to(torch.float64)
    vocab_size = 60
    loss = LOSSES[kind](vocab_size)
    for got, wanted in zip(measured(loss, given), reference(kind, given, vocab_size), strict=True):
        assert off(got, wanted) < 1e-12


@pytest.mark.parametrize("kind", LOSSES)
def test_backward_multiplies_and_runs_once(kind: str) -> None:
    given = sample(7, 5, 20, 6)
    total, plain, _ = measured(LOSSES[kind](VOCAB), given)
    h = given.states.requires_grad_()
    again = LOSSES[kind](VOCAB).total(h, given.weight, given.places, given.values)
    (root,) = torch.autograd.grad(again.sqrt(), h, retain_graph=True)
    assert off(root, plain.double() / (2 * total.sqrt())) < 1e-6
    with pytest.raises(RuntimeError, match="given out once"):
        again.backward()


def fitted(share: float) -> Sample:
    """Errors that f meets up to `share` of their squared sum: every output listed, l = f + noise."""
    given = sample(200, 32, 150, 150, irregular=False)
    f = (given.states.double() @ given.weight.double().T).float()
    noise = torch.randn(f.shape, generator=torch.Generator().manual_seed(3))
    values = f + (share * f.square().mean()).sqrt() * noise
    return Sample(given.states, given.weight, torch.arange(150).expand(200, -1), values)


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_a_small_residual_keeps_its_digits(share: float) -> None:
    given = fitted(share)
    total, d_states, d_weight = reference("rmse", given, 150)
    assert float(total / given.values.double().square().sum()) == pytest.approx(share, rel=0.1)
    got = measured(RootMeanSquare(), given)
    assert float(got[0]) == pytest.approx(float(total), rel=1e-5)
    # l itself is float32: a relative 1e-7 of l is 1e-7 / sqrt(share) of the residual that gradients are made of
    tolerance = 1e-6 / math.sqrt(share)
    assert off(got[1], d_states) < tolerance and off(got[2], d_weight) < tolerance


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(autocast: bool) -> None:
    """bf16 states (no autocast) or float32 states under autocast: products have 8 bits, sums do not."""
    given = sample(300, 128, 2000, 17)
    if not autocast:
        given = given._replace(states=given.states.bfloat16())
    total, d_states, d_weight = reference("rmse", given, 2100)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = measured(RootMeanSquare(), given)
    assert float(got[0]) == pytest.approx(float(total), rel=1e-3)
    assert off(got[1], d_states) < 1e-2
    assert 1e-4 < off(got[2], d_weight) < 1e-2, "the products were not bf16"


@pytest.mark.parametrize("kind", ["kl", "cross_entropy"])
def test_bf16_of_the_softmax_losses(kind: str) -> None:
    given = sample(300, 128, 2000, 17)
    total, d_states, d_weight = reference(kind, given, 2100)
    with torch.autocast("cpu", torch.bfloat16):
        got = measured(LOSSES[kind](2100), given)
    assert float(got[0]) == pytest.approx(float(total), rel=5e-3)
    assert off(got[1], d_states) < 2e-2 and off(got[2], d_weight) < 2e-2


@pytest.mark.parametrize("kind", LOSSES)
def test_parts_add_up_to_the_undivided_batch(kind: str) -> None:
    """Unequal parts, one of them empty: value and gradient are those of one loss over all tokens."""
    given = sample(30, 8, 40, 6)
    loss = LOSSES[kind](80)
    parts = [Sample(given.states[a:b], given.weight, given.places[a:b], given.values[a:b]) for a, b in PARTS]
    made = [measured(loss, part) for part in parts]
    total, d_weight = sum(float(m[0]) for m in made), torch.stack([m[2] for m in made]).sum(0)
    whole, _, wanted = reference(kind, given, 80)
    expected = math.sqrt(float(whole) / 30) if kind == "rmse" else float(whole) / 30
    assert loss.value(total, 30.0) == pytest.approx(expected, rel=1e-6)
    outer = 1 / (2 * math.sqrt(30 * float(whole))) if kind == "rmse" else 1 / 30
    assert off(d_weight * loss.gradient_factor(total, 30.0), wanted * outer) < 1e-5


PARTS = [(0, 7), (7, 7), (7, 30)]


def test_a_perfect_fit_has_a_finite_gradient() -> None:
    loss = RootMeanSquare()
    assert loss.value(0.0, 3.0) == 0.0
    assert math.isfinite(loss.gradient_factor(0.0, 3.0))


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return out


@pytest.mark.parametrize("kind", LOSSES)
def test_no_tensor_of_tokens_by_outputs(kind: str) -> None:
    tokens, width, outputs, listed = 400, 16, 12_000, 9
    given = sample(tokens, width, outputs, listed)
    with Largest() as seen:
        measured(LOSSES[kind](VOCAB), given)
    assert seen.numbers <= BLOCK_ELEMENTS["cpu"] < tokens * outputs / 2
    with Largest() as seen:
        torch.nn.functional.linear(given.states, given.weight)
    assert seen.numbers == tokens * outputs, "a tensor of that size is not seen: nothing was checked"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.mark.parametrize("few_tokens", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_learner_steps_on_the_configured_loss(model_folder: Path, kind: str, few_tokens: bool) -> None:
    """Its loss and gradient are those of the dense loss on f [N, V] of `Copilot.forward`."""
    batch = make_batch(model_folder)
    rows = batch.row_mask
    ids, values = batch.error_ids[rows], batch.error_values[rows]
    # half of the true tokens can be corrected
    output_ids = ids[::2, 0].unique() if few_tokens else None
    config = section(loss=kind, max_grad_norm=1e9)
    learner = Learner(make_copilot(model_folder, output_ids=output_ids), config, total_steps=10)
    result = learner.step(batch)
    got = {name: p.grad for name, p in learner.parameters.items()}

    copilot = make_copilot(model_folder, output_ids=output_ids)
    f = copilot(batch).double()  # KL is a small difference of large numbers
    errors = torch.zeros_like(f).scatter_add(1, ids, values.double())
    if kind == "rmse":
        wanted = (f - errors).square().sum(1).mean().sqrt()
    elif kind == "cross_entropy":
        wanted = torch.nn.functional.cross_entropy(f, ids[:, 0])
    else:
        wanted = torch.nn.functional.kl_div(f.log_softmax(1), errors.softmax(1), reduction="batchmean")
    wanted.backward()
    assert result.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, parameter in copilot.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert off(got[name], parameter.grad.double()) < 1e-4, name
