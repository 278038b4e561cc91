"""Statistics of a log against the same numbers computed row by row, however the log is cut, stored or damaged."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tc_ray.inspection.rows import stream
from tc_ray.inspection.samples import SampleNotFoundError, across_epochs, find_visits, thinned, visits_of
from tc_ray.inspection.stats import LogStats, PositionMap, collect, round_spans
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.store import LogStore
from tests.support.inspection_samples import Example, make_examples, make_log
from tests.support.mistakelog_samples import metadata

EXAMPLES = make_examples(samples=9, epochs=4)


@pytest.fixture(scope="module", params=["top-k", "dense"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MistakeLog:
    return MistakeLog(make_log(tmp_path_factory.mktemp("log"), EXAMPLES, dense=request.param == "dense"))


def predicted(example: Example) -> list[int]:
    return example.p.argmax(1).tolist()


def test_rows_hold_what_the_pilot_saw(log: MistakeLog) -> None:
    found = {}
    for rows in stream(log, others=3):
        for i in range(len(rows)):
            part = slice(rows.target_offsets[i], rows.target_offsets[i + 1])
            found[int(rows.round[i]), int(rows.sample_id[i])] = (rows, part)
    assert len(found) == len(EXAMPLES)
    for example in EXAMPLES:
        rows, part = found[example.round, example.sample]
        assert rows.truth[part].tolist() == example.answer
        assert rows.predicted[part].tolist() == predicted(example)
        np.testing.assert_allclose(rows.p_predicted[part], example.p.max(1), atol=1e-6)
        np.testing.assert_allclose(rows.loss[part], example.loss, rtol=1e-6)
        assert rows.position[part].tolist() == list(range(len(example.answer)))
        others = example.p.copy()
        others[np.arange(len(example.answer)), example.answer] = -1
        order = np.argsort(-others, axis=1, kind="stable")[:, :3]
        np.testing.assert_array_equal(rows.others[part], order)
        np.testing.assert_allclose(rows.p_others[part], np.take_along_axis(others, order, 1), atol=1e-6)


def test_hidden_states_are_never_read(log: MistakeLog, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = MistakeLog.tables

    def tables(self: MistakeLog, rounds: object = None, columns: object = None) -> object:
        asked.append(columns)
        return real(self, rounds, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(MistakeLog, "tables", tables)
    collect(log)
    assert asked and all(columns and not {"rationale", "question"} & set(columns) for columns in asked)


def test_totals_by_round_and_by_earlier_visits(log: MistakeLog) -> None:
    stats = collect(log)
    assert (stats.rows, stats.first_round, stats.last_round) == (len(EXAMPLES), 1, max(e.round for e in EXAMPLES))
    for round_ in range(1, stats.last_round + 1):
        check_line(stats.by_round.line([round_ - 1]), [e for e in EXAMPLES if e.round == round_])
    for seen in range(4):
        check_line(stats.by_seen.line([seen]), [e for e in EXAMPLES if e.seen == seen])
    first, last = stats.over([(1, 3), (4, stats.last_round)])
    check_line(first, [e for e in EXAMPLES if e.round <= 3])
    check_line(last, [e for e in EXAMPLES if e.round > 3])


def check_line(line: dict[str, float | int | None], examples: list[Example]) -> None:
    loss, correct = np.concatenate([e.loss for e in examples]), np.concatenate([e.correct for e in examples])
    assert line["rows"] == len(examples)
    assert line["target_tokens"] == len(loss)
    assert line["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert line["error"] == pytest.approx((1 - np.exp(-loss)).mean(), rel=1e-5)
    assert line["wrong_tokens"] == (~correct).sum()
    assert line["rows_with_mistake"] == sum(not e.correct.all() for e in examples)


def test_missed_tokens_and_what_was_predicted_instead(log: MistakeLog) -> None:
    stats = collect(log)
    true, missed, pairs = Counter(), Counter(), Counter()
    for example in EXAMPLES:
        for truth, heard in zip(example.answer, predicted(example), strict=True):
            true[truth] += 1
            if truth != heard:
                missed[truth] += 1
                pairs[truth, heard] += 1
    assert missed, "the sample has mistakes"
    assert [stats.tokens.missed[t] for t in stats.missed(100)] == sorted(missed.values(), reverse=True)
    for token in true:
        assert (stats.tokens.true[token], stats.tokens.missed[token]) == (true[token], missed[token])
        instead = stats.tokens.instead_of(token)
        assert dict(instead) == {s: n for (t, s), n in pairs.items() if t == token}
        assert [n for _, n in instead] == sorted((n for _, n in instead), reverse=True)


def test_samples_and_the_hardest_of_them(log: MistakeLog) -> None:
    stats = collect(log)
    mean = {s: np.concatenate([e.loss for e in EXAMPLES if e.sample == s]).mean() for s in range(9)}
    order = stats.hardest(9).sample_id.tolist()
    assert order == sorted(mean, key=lambda s: -mean[s])
    for place, sample in enumerate(stats.samples.sample_id):
        mine = [e for e in EXAMPLES if e.sample == sample]
        assert stats.samples.visits[place] == 4
        assert stats.samples.first_round[place] == mine[0].round
        assert stats.samples.first_loss[place] == pytest.approx(mine[0].loss.mean(), rel=1e-5)
        assert stats.samples.last_round[place] == mine[-1].round
        assert stats.samples.last_loss[place] == pytest.approx(mine[-1].loss.mean(), rel=1e-5)
        assert stats.samples.wrong[place] == sum((~e.correct).sum() for e in mine)


def test_places_in_the_answer(log: MistakeLog) -> None:
    stats = collect(log)
    assert stats.spans == [(round, round) for round in range(1, stats.last_round + 1)]
    for example in EXAMPLES:
        column = example.round - 1
        same = [e for e in EXAMPLES if e.round == example.round]
        for place in range(len(example.answer)):
            there = [e for e in same if len(e.answer) > place]
            assert stats.positions.tokens[column, place] == len(there)
            assert stats.positions.error[column, place] == pytest.approx(
                sum(1 - np.exp(-e.loss[place]) for e in there), rel=1e-5
            )


def test_calibration(log: MistakeLog) -> None:
    found = collect(log).confidence
    for group in (0, 1):
        examples = [e for e in EXAMPLES if (e.seen > 0) == group]
        p = np.concatenate([e.p.max(1) for e in examples])
        right = np.concatenate([e.correct for e in examples])
        gap = 0.0
        for bin_ in range(20):
            inside = (p >= bin_ / 20) & (p < (bin_ + 1) / 20)
            assert found.tokens[group, bin_] == inside.sum()
            gap += abs(p[inside].sum() - right[inside].sum())
        summary = found.summary(group)
        assert summary["gap"] == pytest.approx(gap / len(p), rel=1e-4)
        assert summary["accuracy"] == pytest.approx(right.mean()) and summary["tokens"] == len(p)
        assert summary["bias"] == pytest.approx(p.mean() - right.mean(), rel=1e-3, abs=1e-6)


def test_a_span_of_rounds(log: MistakeLog) -> None:
    stats = collect(log, (4, 7))
    chosen = [e for e in EXAMPLES if 4 <= e.round <= 7]
    check_line(stats.by_round.line(slice(None)), chosen)
    assert (stats.first_round, stats.last_round) == (4, 7)
    assert collect(log, (500, 600)).rows == 0


def test_statistics_do_not_depend_on_how_files_are_cut(tmp_path: Path) -> None:
    texts = TokenTexts(None, "")

    def numbers(rounds_a_file: int) -> dict[str, object]:
        folder = make_log(tmp_path / str(rounds_a_file), EXAMPLES, rounds_a_file=rounds_a_file)
        document = collect(MistakeLog(folder)).to_dict(texts, 5)
        return {key: value for key, value in document.items() if key not in ("version", "files", "bytes")}

    assert numbers(1) == numbers(50)


def test_a_damaged_file_is_named_and_counted_nowhere(tmp_path: Path) -> None:
    log = MistakeLog(make_log(tmp_path / "log", EXAMPLES))
    broken = log.files[1]
    path = tmp_path / "log" / broken.name
    path.write_bytes(path.read_bytes()[:-50])
    stats = collect(log)
    assert len(stats.bad_files) == 1 and broken.name in stats.bad_files[0]
    left = [e for e in EXAMPLES if not broken.round_min <= e.round <= broken.round_max]
    check_line(stats.by_round.line(slice(None)), left)


def test_dropped_records_are_counted(tmp_path: Path) -> None:
    assert collect(MistakeLog(make_log(tmp_path / "a", EXAMPLES))).dropped == 0
    log = MistakeLog(make_log(tmp_path / "b", EXAMPLES, dropped=7))
    assert collect(log).dropped == 7
    assert collect(log, (1, 3)).dropped == 0


def other_truth(rows: Records) -> None:
    rows.error_ids[:, 0] = (rows.error_ids[:, 0] + 1) % 50


def test_a_file_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    log = MistakeLog(make_log(tmp_path / "log", EXAMPLES, spoil=other_truth))
    with pytest.raises(LogSchemaError, match=rf"{log.files[1].name}: .* true tokens"):
        collect(log)


def test_visits_to_a_sample(log: MistakeLog) -> None:
    visits = visits_of(log, 3)
    mine = [e for e in EXAMPLES if e.sample == 3]
    assert [s.round for s in visits] == [e.round for e in mine]
    for visit, example in zip(visits, mine, strict=True):
        assert visit.prompt.tolist() == example.prompt and visit.truth.tolist() == example.answer
        heard = np.where(visit.correct, visit.truth, visit.others[:, 0])
        assert heard.tolist() == predicted(example)
        assert all(v.base is None for v in vars(visit).values() if isinstance(v, np.ndarray)), "keeps a file in memory"
        assert visit.wrong == (~example.correct).sum()
        assert visit.p_true(0) == pytest.approx(example.p[0, example.answer[0]], rel=1e-4)
    assert [s.round for s in visits_of(log, 3, mine[1].round)] == [mine[1].round]
    with pytest.raises(SampleNotFoundError, match="samples are 0 to 8"):
        visits_of(log, 77)
    with pytest.raises(SampleNotFoundError, match=f"but in {mine[0].round},"):
        visits_of(log, 3, 999)
    assert find_visits(log, []) == {}


def test_across_epochs_are_the_largest_changes() -> None:
    names = ("sample_id", "visits", "first_loss", "last_loss")
    columns = [
        np.arange(5),
        np.array([3, 3, 3, 1, 2]),
        np.array([5.0, 1, 3, 9, 0.2]),
        np.array([0.1, 2.5, 2.9, 9, 0.2]),
    ]
    table = np.rec.fromarrays(columns, names=names)  # type: ignore[call-overload]
    assert across_epochs(table, 1) == [("learned", 0), ("got worse", 1)]
    assert across_epochs(table, 3) == [("learned", 0), ("learned", 2), ("got worse", 1)]
    assert across_epochs(table[:0], 3) == []


def test_longer_answers_share_columns() -> None:
    long = Example(1, 0, 0, [1], [2] * 200, np.full((200, 4), 0.25))
    short = Example(1, 1, 0, [1], [2] * 3, np.full((3, 4), 0.25))

    class Rows:
        def __init__(self, example: Example) -> None:
            count = len(example.answer)
            self.position, self.row = np.arange(count), np.zeros(count, int)
            self.error, self.correct = np.ones(count), np.zeros(count, bool)

    found = PositionMap(1)
    for example in (short, long, short):
        found.add(np.zeros(1, int), Rows(example))  # type: ignore[arg-type]
    assert (found.width, found.means().shape) == (8, (1, 25))
    assert found.tokens[0, :2].tolist() == [14, 8] and found.tokens.sum() == 206


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 120), (5, 125), (1, 3597), (0, 10**6)])
def test_spans_cover_each_round_once(first: int, last: int) -> None:
    spans = round_spans(first, last, 120)
    assert len(spans) <= 120
    assert spans[0][0] == first and spans[-1][1] == last
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(spans))
    assert {high - low for low, high in spans[:-1]} <= {spans[0][1] - spans[0][0]}


def test_thinned_keeps_both_ends() -> None:
    many = list(range(100))
    assert thinned(many, 12)[0] == 0 and thinned(many, 12)[-1] == 99 and len(thinned(many, 12)) == 12
    assert thinned(many[:5], 12) == many[:5]


def test_an_empty_log_has_statistics(tmp_path: Path) -> None:
    LogStore.create(tmp_path, metadata())
    stats = collect(MistakeLog(tmp_path))
    assert isinstance(stats, LogStats) and stats.rows == 0
    document = stats.to_dict(TokenTexts(None, ""), 3)
    assert document["rows"] == 0 and document["loss"] is None and document["hardest_samples"] == []
