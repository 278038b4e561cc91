"""`log.top_k: auto`, sampling and the costs of the log, through the recorder, a real writer, Ledger and table."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.batches import collate
from tc_ray.mistakelog.datafile import DataFile
from tc_ray.mistakelog.ledger import Ledger
from tc_ray.mistakelog.reader import MistakeLog
from tc_ray.mistakelog.records import Records
from tc_ray.mistakelog.sampling import has_mistake
from tc_ray.mistakelog.store import LogStore
from tc_ray.mistakelog.writer import RecordWriter
from tc_ray.models.errors import SparseErrors, full_errors, sparse_errors
from tc_ray.pilot.engine import pilot_step
from tc_ray.pilot.error_width import ErrorCurve, measured_rounds, told
from tc_ray.pilot.log_metadata import log_metadata
from tc_ray.pilot.recorder import Recorder
from tests.family_samples import new_pilot, quiet, reference_model
from tests.mistakelog_samples import assert_same, random_records
from tests.tiny_families import VOCAB
from tests.tiny_model import make_tokenizer

quiet()

ROUNDS, MICRO = 5, 3
LISTED = 256
"""Errors listed a token while k is measured."""
CPU = torch.device("cpu")


def config_of(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(sections)


# -- how long is measured, and what is chosen ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "expected", "sections"),
    [
        (100, 4, {}),
        (100, 6, {"log": {"top_k_rounds": 6}}),
        (100, 3, {"pilot": {"checkpoint_every_rounds": 3}}),
        (2, 2, {}),
        (100, 1, {"copilot": {"schedule": "lockstep"}}),
        (100, 2, {"log": {"queue_rounds": 2}}),
        (100, 0, {"log": {"top_k": 64}}),
        (100, 0, {"log": {"error": "dense"}}),
        (100, 0, {"log": {"enabled": False}}),
    ],
)
def test_measured_rounds(rounds: int, expected: int, sections: dict[str, Any]) -> None:
    assert measured_rounds(config_of(**sections), rounds) == expected


@pytest.mark.parametrize("norm", [1, 2])
def test_the_smallest_k_that_holds_the_share(norm: int) -> None:
    """Against |l| of all tokens, sorted token by token."""
    torch.manual_seed(2)
    log_probs, targets = (3 * torch.randn(40, 300)).log_softmax(-1), torch.randint(0, 300, (40,))
    errors = -log_probs.exp()
    errors[torch.arange(40), targets] += 1.0
    size = errors.abs().double()
    others = size.scatter(1, targets[:, None], 0.0).sort(1, descending=True).values
    ordered = torch.cat([size.gather(1, targets[:, None]), others], 1)
    curve = ErrorCurve(LISTED, CPU)
    for part in torch.arange(40).split(7):
        curve.add(sparse_errors(log_probs[part], targets[part], LISTED))
    for asked in (0.6, 0.9, 0.99, 0.999):
        k = curve.smallest(asked, norm)
        parts = [float(torch.linalg.vector_norm(ordered[:, : n + 1], norm, dim=1).sum()) for n in (k - 1, k)]
        held = [part / float(torch.linalg.vector_norm(size, norm, dim=1).sum()) for part in parts]
        assert (held[0] < asked or k == 1) and asked <= held[1]
        assert curve.captured(k, norm) == pytest.approx(held[1], rel=1e-6)
    assert curve.smallest(0.9999999999, 1) == LISTED
    two = ErrorCurve(LISTED, CPU)
    two.add(SparseErrors(torch.zeros(0, 257), torch.zeros(0, 257), torch.zeros(0)))
    assert two.smallest(0.999, norm) == 1 and two.captured(1, norm) == 1.0


def test_what_is_not_listed_never_flatters_the_share() -> None:
    """4 of 300 even errors are listed: the squares of the others are known by their sum and the smallest one listed."""
    log_probs, targets = torch.zeros(6, 300).log_softmax(-1), torch.zeros(6, dtype=torch.int64)
    curve = ErrorCurve(4, CPU)
    curve.add(sparse_errors(log_probs, targets, 4))
    size = torch.full((300,), 1 / 300).double()
    size[0] = 299 / 300
    assert curve.captured(4, 2) == pytest.approx(float(size[:5].norm() / size.norm()), rel=1e-6)
    uneven = torch.tensor([[0.0, 5, 4, 3, 2, 1, 0, -1]]).log_softmax(-1)
    curve = ErrorCurve(2, CPU)
    curve.add(sparse_errors(uneven, targets[:1], 2))
    true = full_errors(uneven, targets[:1]).values[0].abs().sort(descending=True).values
    share = float(true[:3].norm() / true.norm())
    assert 0.98 * share < curve.captured(2, 2) < share


def half_of_a_curve(rank: int, meeting: Path, out: Path) -> None:
    """In a process of its own: the tokens of one of two ranks."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    curve = curve_of(slice(rank, None, 2))
    curve.add_over_ranks()
    torch.save(curve.sums, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def curve_of(tokens: slice) -> ErrorCurve:
    """Of 40 tokens, the odd ones of which the Pilot is much surer of."""
    torch.manual_seed(6)
    log_probs = (torch.randn(40, 300) * (1 + 4 * (torch.arange(40) % 2))[:, None]).log_softmax(-1)[tokens]
    curve = ErrorCurve(LISTED, CPU)
    curve.add(sparse_errors(log_probs, torch.arange(40)[tokens], LISTED))
    return curve


def test_k_is_chosen_over_all_ranks(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=half_of_a_curve, args=(rank, tmp_path / "meeting", tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    whole, one, other = curve_of(slice(None)), curve_of(slice(0, None, 2)), curve_of(slice(1, None, 2))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole.sums, rtol=1e-12, atol=0)
    assert len({curve.smallest(0.9, 1) for curve in (whole, one, other)}) == 3, "the ranks' own choices would do"


def test_what_is_told_of_the_choice() -> None:
    curve = ErrorCurve(3, CPU)
    curve.sums[0] = torch.tensor([50.0, 80, 88, 90, 100])
    curve.sums[1] = torch.tensor([70.0, 99, 99.914, 99.9995, 100])
    log = RunConfig().log
    assert told(2, curve, log, 4) == (
        "the log keeps the 2 largest errors a token: 99.91% of |l| in rounds 1 to 4 (the Euclidean norm; 88.00% of the "
        "summed errors)"
    )
    assert "99.9995% of |l|" in told(3, curve, log, 4)
    summed = log.model_copy(update={"top_k_norm": 1, "top_k_limit": 3})
    short = told(3, curve, summed, 4)
    assert "90.00% of |l| in rounds 1 to 4 (the summed errors; 99.9995% of the Euclidean norm)" in short
    assert "less than the 99.9%" in short and "log.top_k_limit is 3" in short and "log.error=dense" in short
    standing = told(2, curve, summed, 4)
    assert "less than" in standing and "limit" not in standing


def test_truncated_is_what_the_smaller_k_would_have_listed() -> None:
    torch.manual_seed(3)
    log_probs, targets = (3 * torch.randn(30, 400)).log_softmax(-1), torch.randint(0, 400, (30,))
    base = random_records(8, seed=2)
    count = int(base.target_offsets[-1])
    made = {}
    for k in (LISTED, 5):
        e = sparse_errors(log_probs[:count], targets[:count], k)
        made[k] = Records(
            **{
                name: getattr(base, name)
                for name in Records.__dataclass_fields__
                if not name.startswith("error_") and name != "error"
            },
            error_ids=e.ids.int().numpy(),
            error_values=e.values.numpy(),
            error_rest=e.rest.numpy(),
        )
    cut = made[LISTED].truncated(5)
    np.testing.assert_array_equal(cut.error_ids, made[5].error_ids)
    np.testing.assert_array_equal(cut.error_values, made[5].error_values)
    np.testing.assert_allclose(cut.error_rest, made[5].error_rest, atol=1e-6)
    cut.validate()
    assert cut.truncated(5) is cut
    with pytest.raises(ValueError, match="the 6 largest of 5"):
        cut.truncated(6)


# -- a run ---------------------------------------------------------------------------------------------------------


def micro_batches(number: int) -> list[dict[str, np.ndarray]]:
    """Two of a round; some completions the Pilot gets right are among them by chance."""
    rng = np.random.default_rng(number)
    made = []
    for part in range(2):
        rows = [
            {
                "input_ids": rng.integers(2, VOCAB, 6 + row + number).tolist(),
                "target_start": int(rng.integers(3, 6 + number)),
                "sample_id": 100 * number + 10 * part + row,
            }
            for row in range(MICRO)
        ]
        made.append(collate(rows, 0))
    return made


class Run:
    """Rounds of an untrained Pilot into a real log in `folder`; the weights stay, so that attempts can be compared."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.config = config_of(**{"run": {"folder": folder}, **sections})
        shape = reference_model("llama").config
        store = LogStore.create(self.config.log_location, log_metadata(self.config, shape, make_tokenizer()))
        self.ledger = Ledger(store.location, writers=1, run=self.config.run.name)
        self.lock = threading.Lock()
        self.told: list[tuple[str, str]] = []
        self.metrics: list[dict[str, float]] = []

    def attempt(self, start: int, last: int, *, close: bool = True, device: torch.device = CPU) -> Recorder:
        log = self.config.log
        with self.lock:
            attempt = self.ledger.begin_attempt(start, 1)
        writer = RecordWriter(
            self.config.log_location,
            self.commit,
            run=self.config.run.name,
            rank=0,
            attempt=attempt,
            flush_rounds=1,
            file_bytes=log.file_bytes,
            queue_rounds=log.queue_rounds,
            full_policy=log.full_policy,
            start_round=start,
        )
        step = pilot_step(new_pilot("llama").eval(), self.config).eval().to(device)
        recorder = Recorder(
            self.config,
            writer,
            step,
            device,
            rank=0,
            world_size=1,
            attempt=attempt,
            rounds=ROUNDS,
            start_round=start,
            stored_top_k=LogStore(self.config.log_location).metadata.top_k,
            choose=self.choose,
            tell=lambda kind, text: self.told.append((kind, text)),
        )
        for number in range(start + 1, last + 1):
            for batch in micro_batches(number):
                ids, lengths, starts = (
                    torch.from_numpy(batch[n]).to(device) for n in ("input_ids", "lengths", "target_start")
                )
                record = step(ids, lengths, starts, 1.0)[1]
                recorder.record(record, batch, np.zeros(MICRO, np.int16), number)
            recorder.end_round(number)
            self.metrics.append(recorder.metrics())
        if close:
            recorder.close()
        return recorder

    def choose(self, top_k: int) -> int:
        with self.lock:
            return self.ledger.choose_top_k(top_k)

    def commit(self, file: DataFile) -> int:
        """One call at a time, as in an actor: an attempt left behind may still commit."""
        with self.lock:
            return self.ledger.commit(file)

    def records(self) -> Records:
        made = MistakeLog(self.config.log_location).records()
        return made.select(np.lexsort((made.sample_id, made.round)))


@pytest.mark.parametrize("asked", [{"top_k_captured": 0.999}, {"top_k_captured": 0.9, "top_k_norm": 1}])
def test_the_log_is_that_of_the_chosen_k(tmp_path: Path, asked: dict[str, float]) -> None:
    run = Run(tmp_path / "auto", log={"top_k_rounds": 3, **asked})
    assert LogStore(run.config.log_location).metadata.top_k == 0
    run.attempt(0, ROUNDS)
    k = LogStore(run.config.log_location).metadata.top_k
    assert 1 < k < VOCAB - 1
    ((kind, text),) = run.told
    assert kind == "log" and f"the {k} largest errors a token: 9" in text and "in rounds 1 to 3" in text
    found = run.records()
    assert found.top_k == k and len(found) == ROUNDS * 2 * MICRO
    # the share by hand, of the rounds measured
    measured = found.select(np.flatnonzero(found.round <= 3))
    size, rest = np.abs(measured.error_values).astype(np.float64), measured.error_rest.astype(np.float64)
    share = run.metrics[-1]["captured_share"]
    assert asked["top_k_captured"] <= share < 1
    if "top_k_norm" in asked:
        assert size.sum() / (2 * size[:, 0].sum()) == pytest.approx(share, rel=1e-6)
    else:
        held = np.sqrt(np.square(size).sum(1))
        most = np.sqrt(
            np.square(size).sum(1) + rest * size[:, -1]
        )  # each error that is not listed is below the last one
        assert held.sum() / most.sum() <= share
        assert np.sqrt(np.square(size[:, :-1]).sum(1)).sum() < 0.999 * held.sum() / share
    fixed = Run(tmp_path / "fixed", log={"top_k": k})
    fixed.attempt(0, ROUNDS)
    expected = fixed.records()
    assert not fixed.told
    np.testing.assert_allclose(found.error_rest, expected.error_rest, atol=1e-6)
    found.error_rest = expected.error_rest
    assert_same(found, expected)


@pytest.mark.gpu
def test_the_log_of_a_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Through the side stream and the writer; first rounds held back until k is known."""
    log = {"top_k_rounds": 2, "top_k_captured": 0.9, "top_k_norm": 1}
    found = {}
    for device in ("cpu", "cuda"):
        run = Run(tmp_path / device, log=log)
        run.attempt(0, ROUNDS, device=torch.device(device))
        found[device] = run.records()
    cpu, cuda = found["cpu"], found["cuda"]
    assert cuda.top_k == cpu.top_k and len(cuda) == len(cpu) == ROUNDS * 2 * MICRO
    for name in ("round", "sample_id", "input_ids", "target_offsets", "token_correct"):
        np.testing.assert_array_equal(getattr(cuda, name), getattr(cpu, name))
    # fp32 sums in another order; states are kept in bf16
    for name in ("error_values", "error_rest", "token_loss"):
        np.testing.assert_allclose(getattr(cuda, name), getattr(cpu, name), atol=1e-4)


def test_no_more_than_the_limit_is_chosen(tmp_path: Path) -> None:
    """A share that the limit does not reach is told; with the default one the log holds it, and no error more than it takes."""
    found = {}
    for name, limit in (("low", {"top_k_limit": 5}), ("default", {})):
        run = Run(tmp_path / name, log={"top_k_rounds": 2, "top_k_captured": 0.99, "top_k_norm": 1, **limit})
        run.attempt(0, ROUNDS)
        found[name] = run.records()
        assert ("log.top_k_limit is 5" in run.told[0][1]) == bool(limit)
    low, default = found["low"], found["default"]
    assert low.top_k == 5 < default.top_k < VOCAB - 1
    measured = np.repeat(default.round <= 2, np.diff(default.target_offsets))
    size = np.abs(default.error_values[measured]).astype(np.float64)
    whole = 2 * size[:, 0].sum()
    assert size[:, :-1].sum() < 0.99 * whole <= size.sum()


def test_nothing_is_in_the_log_until_k_is_chosen(tmp_path: Path) -> None:
    run = Run(tmp_path, log={"top_k_rounds": 3})
    recorder = run.attempt(0, 2, close=False)
    assert run.ledger.state().rows == 0 and "top_k" not in run.metrics[-1]
    del recorder


@pytest.mark.parametrize("died_after", [1, 2, 3, 4])
def test_a_replay_writes_the_same_rows(tmp_path: Path, died_after: int) -> None:
    """Killed before, at and after the choice, and begun again from the start: bit for bit the log of one attempt."""
    log = {"top_k_rounds": 2, "top_k_captured": 0.9, "top_k_norm": 1}
    whole, torn = Run(tmp_path / "whole", log=log), Run(tmp_path / "torn", log=log)
    whole.attempt(0, ROUNDS)
    torn.attempt(0, died_after, close=False)
    torn.attempt(0, ROUNDS)
    found, expected = torn.records(), whole.records()
    assert set(found.attempt.tolist()) == {2}
    found.attempt = expected.attempt
    assert_same(found, expected)


def test_a_resumed_attempt_takes_k_from_the_log(tmp_path: Path) -> None:
    log = {"top_k_rounds": 2, "top_k_captured": 0.9, "top_k_norm": 1}
    whole, resumed = Run(tmp_path / "whole", log=log), Run(tmp_path / "resumed", log=log)
    whole.attempt(0, ROUNDS)
    resumed.attempt(0, 3)
    resumed.attempt(3, ROUNDS)
    assert len(resumed.told) == 1, "it is chosen once"
    found, expected = resumed.records(), whole.records()
    found.attempt = expected.attempt
    assert_same(found, expected)
    # a checkpoint beside a log that has no rows of its rounds
    other = Run(tmp_path / "other", log=log)
    other.ledger.begin_attempt(0, 1)
    with pytest.raises(ValueError, match=r"top_k 0.*round 3.*not the one of this run.folder"):
        Recorder(
            other.config, None, pilot_step(new_pilot("llama"), other.config), CPU, rank=0, world_size=1, attempt=1,
            rounds=9, start_round=3, stored_top_k=0, choose=lambda k: k, tell=lambda *_: None,
        )  # type: ignore[arg-type]  # fmt: skip


def test_the_first_choice_stands(tmp_path: Path) -> None:
    run = Run(tmp_path, log={"top_k_rounds": 2, "top_k_captured": 0.9, "top_k_norm": 1})
    assert run.ledger.choose_top_k(3) == 3
    run.attempt(0, ROUNDS)
    assert run.records().top_k == 3
    assert "the 3 largest" in run.told[0][1] and "less than the 90% of log.top_k_captured" in run.told[0][1]


def test_a_burst_of_held_rounds_fits_into_the_queue(tmp_path: Path) -> None:
    """Policy subsample drops what finds the queue full: the rounds held back must not."""
    run = Run(tmp_path, log={"top_k_rounds": 4, "queue_rounds": 3, "full_policy": "subsample"})
    run.attempt(0, 3)
    assert run.metrics[-1]["dropped_records"] == 0 and len(run.records()) == 3 * 2 * MICRO


@pytest.mark.parametrize("top_k", [4, "auto"])
def test_sampling_leaves_the_rest_as_it_is(tmp_path: Path, top_k: Any) -> None:
    whole = Run(tmp_path / "whole", log={"top_k": top_k})
    whole.attempt(0, ROUNDS)
    everything = whole.records()
    for sampling in ({"sampling": "fraction", "sampling_fraction": 0.4}, {"sampling": "mistakes", "mistake_loss": 9.0}):
        run = Run(tmp_path / sampling["sampling"], log={"top_k": top_k, **sampling})
        recorder = run.attempt(0, ROUNDS)
        found = run.records()
        kept = np.isin(everything.sample_id, found.sample_id)
        assert 0 < kept.sum() < len(everything) or sampling["sampling"] == "mistakes"
        assert recorder.skipped == len(everything) - kept.sum()
        assert_same(found, everything.select(np.flatnonzero(kept)))
        assert run.ledger.state().round == ROUNDS, "rounds without a record are covered too"
        if sampling["sampling"] == "mistakes":
            loss = (everything.token_correct, everything.token_loss, everything.target_offsets)
            np.testing.assert_array_equal(kept, has_mistake(*loss, 9.0))


def test_bytes_a_token(tmp_path: Path) -> None:
    run = Run(tmp_path, log={"top_k": 4})
    recorder = run.attempt(0, ROUNDS)
    tokens = sum(int(b["lengths"].sum()) for number in range(1, ROUNDS + 1) for b in micro_batches(number))
    assert recorder.metrics()["bytes_per_token"] == pytest.approx(run.ledger.state().bytes / tokens)
    assert recorder.metrics()["top_k"] == 4.0
