"""The Copilot's buffer: which rounds it holds, and that a draw depends on nothing but rows and seed."""

from __future__ import annotations

from collections import Counter

import pytest

from tc_ray.copilot.batch import batch_from_records
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.mistakelog.rows.records import Records
from tests.support.mistakelog_samples import assert_same, random_records

ROWS = 4


def of_round(number: int, rank: int = 0) -> Records:
    return random_records(ROWS, round=number, rank=rank, first_sample=100 * number + 10 * rank)


def drawn_rounds(buffer: RoundBuffer) -> set[int]:
    return set(buffer.draw(400, (1, 2)).round.tolist())


def test_holds_the_newest_rounds() -> None:
    buffer = RoundBuffer(3)
    for number in (1, 2, 3):
        buffer.add(f"file{number}", of_round(number))
    assert len(buffer) == 3 * ROWS and drawn_rounds(buffer) == {1, 2, 3}
    buffer.add("file4", of_round(4))
    # a file that the window cuts through: rounds 5 and 6 push out 2 and 3, and later half of this file
    buffer.add("file56", Records.concat([of_round(5), of_round(6)]))
    assert len(buffer) == 3 * ROWS and drawn_rounds(buffer) == {4, 5, 6}
    buffer.add("file7", of_round(7))
    buffer.add("file8", of_round(8))
    assert drawn_rounds(buffer) == {6, 7, 8}


def test_forgets_what_left_the_window() -> None:
    buffer = RoundBuffer(3)
    sizes = []
    for number in range(1, 30):
        buffer.add(f"file{number}", of_round(number))
        assert len(buffer) == ROWS * min(number, 3)
        sizes.append(buffer.nbytes)
    assert max(sizes[5:]) < 3 * max(sizes[:3]), "memory grows with the log"


def test_old_rounds_do_not_come_back() -> None:
    """A restarted learner may read files in any order."""
    buffer = RoundBuffer(2)
    for number in (9, 1, 8):
        buffer.add(f"file{number}", of_round(number))
    assert drawn_rounds(buffer) == {8, 9}


def test_removed_files_are_not_drawn() -> None:
    """The Pilot was killed: the log drops rounds 3 and 4, and they are written anew."""
    buffer = RoundBuffer(10)
    for number in (1, 2, 3, 4):
        buffer.add(f"a1-{number}", of_round(number))
    len(buffer)
    buffer.remove("a1-3")
    buffer.remove("a1-4")
    buffer.remove("never there")
    assert drawn_rounds(buffer) == {1, 2}
    buffer.add("a2-3", of_round(3))
    assert drawn_rounds(buffer) == {1, 2, 3}


def test_draw_depends_on_rows_and_seed_alone() -> None:
    """Not on the order of reading, nor on how the rounds were cut into files: restarts and ranks draw alike."""
    parts = {(number, rank): of_round(number, rank) for number in (1, 2, 3) for rank in (0, 1)}
    one = RoundBuffer(8)
    for (number, rank), records in parts.items():
        one.add(f"rank{rank}-round{number}", records)
    other = RoundBuffer(8)
    for rank in (1, 0):
        other.add(f"z{rank}", Records.concat([parts[number, rank] for number in (3, 1, 2)]))
    for seed in ((17, 0xC0, 0), (17, 0xC0, 1)):
        assert_same(one.draw(20, seed), other.draw(20, seed))
        assert_same(one.draw(20, seed), one.draw(20, seed))
    assert one.draw(20, (17, 0xC0, 0)).sample_id.tolist() != one.draw(20, (17, 0xC0, 1)).sample_id.tolist()


def test_draws_are_uniform_over_records() -> None:
    """Not over rounds, files or tokens: a round of 1 record beside rounds of 20, sequences of different lengths."""
    buffer = RoundBuffer(8)
    for number, rows in ((1, 20), (2, 1), (3, 20)):
        buffer.add(f"file{number}", random_records(rows, round=number, first_sample=100 * number))
    draws = 41 * 400
    counts = Counter(int(s) for step in range(40) for s in buffer.draw(draws // 40, (5, step)).sample_id)
    assert len(counts) == 41
    expected = draws / 41
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    # 40 degrees of freedom: mean 40, standard deviation 9; 80 has p = 2e-4, and the seed is fixed
    assert chi_square < 80


def test_a_sample_is_of_its_rounds_without_repeats() -> None:
    buffer = RoundBuffer(8)
    for number in (1, 2, 3, 4):
        buffer.add(f"file{number}", of_round(number))
    assert buffer.newest == 4
    found = buffer.sample(99, (1,), after=1, up_to=3)
    assert found is not None
    assert sorted(zip(found.round.tolist(), found.sample_id.tolist(), strict=True)) == [
        (number, 100 * number + row) for number in (2, 3) for row in range(ROWS)
    ]
    unseen = buffer.sample(99, (1,), unseen=True)
    assert unseen is not None
    everything = Records.concat([of_round(number) for number in (1, 2, 3, 4)])
    assert set(unseen.sample_id.tolist()) == set(everything.sample_id[everything.seen == 0].tolist())
    few, again, other = (buffer.sample(5, (seed,)) for seed in (1, 1, 2))
    assert few is not None and again is not None and other is not None
    assert len(set(few.sample_id.tolist())) == 5 and few.sample_id.tolist() == again.sample_id.tolist()
    assert few.sample_id.tolist() != other.sample_id.tolist()
    assert buffer.sample(5, (1,), after=4) is None and RoundBuffer(3).newest == 0


def test_unpooled_states_are_refused() -> None:
    with pytest.raises(ValueError, match="these records hold 2 layers"):
        batch_from_records(random_records(3, layers=2))
