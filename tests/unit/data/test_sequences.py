"""Item sequences: lines, labels, leave-one-out rows, the generated set, tokens of an encoder-decoder."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer

from tc_ray.config.data import DataSection, SequencesSection
from tc_ray.config.fusion import FusionSection
from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.encode.tokenize import completion_ids, encode, prompt_ids
from tc_ray.data.source.embedded import FOLLOW, SUCCESSORS, write_generated
from tc_ray.data.source.files import DataFile
from tc_ray.data.source.find import find_sources
from tc_ray.data.source.records import DataError
from tc_ray.data.source.sequences import SequenceReader, label_items, read_items, scan, write_items
from tc_ray.data.source.shapes import Example, Turn
from tc_ray.run.plan.data_estimate import estimate
from tests.support.tiny_model import make_tokenizer

ITEMS_MODEL = Path(__file__).resolve().parents[3] / "tc_ray" / "recipes" / "models" / "t5-items"


def write(folder: Path, text: str | bytes, name: str = "s.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(path: Path, part: str, **config: int) -> list[tuple[str, str]]:
    """(prompt, completion) of a part, with items labelled by themselves."""
    found = scan([DataFile(str(path))])
    same = {item: item for item in found.items}
    read = SequenceReader(part, same, found.left_out, SequencesSection.model_validate(config))
    records = list(read(DataFile(str(path))))
    assert all(record.value["answer"] == record.value["completion"] for record in records)
    return [(record.value["prompt"], record.value["completion"]) for record in records]


# -- rows ---------------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, "u1 a b c d e\nu2 x y z\n")
    assert rows(path, "train") == [("a", "b"), ("a b", "c")]
    assert rows(path, "validation") == [("a b c", "d"), ("x", "y")]
    assert rows(path, "test") == [("a b c d", "e"), ("x y", "z")]


def test_history_and_rows_a_user_are_limited(tmp_path: Path) -> None:
    path = write(tmp_path, "u 1 2 3 4 5 6 7\n")
    assert rows(path, "train", history=2) == [("1", "2"), ("1 2", "3"), ("2 3", "4"), ("3 4", "5")]
    assert rows(path, "train", history=2, rows_per_user=2) == [("2 3", "4"), ("3 4", "5")], "the latest ones"
    assert rows(path, "validation", history=2, rows_per_user=1) == [("4 5", "6")]
    assert rows(path, "test", history=1) == [("6", "7")]


def test_no_part_sees_a_later_target(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    write_generated(SequencesSection(users=30, items=40, clusters=4), path, seed=3)
    given = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
    trained: dict[str, list[str]] = defaultdict(list)
    found = scan([DataFile(str(path))])
    read = SequenceReader("train", {i: i for i in found.items}, found.left_out, SequencesSection(history=5))
    for record in read(DataFile(str(path))):
        user = record.raw.split(":")[0]
        trained[user] = [*trained[user], record.value["completion"]]
        items = given[user].split()
        assert [*record.value["prompt"].split(), record.value["completion"]] == items[
            max(0, len(trained[user]) - 5) : len(trained[user]) + 1
        ]
    assert all(trained[user] == items.split()[1:-2] for user, items in given.items() if len(items.split()) > 3)


# -- bad lines ----------------------------------------------------------------------------------------------------


def test_bad_lines_are_named_and_left_out_of_rows_and_items(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbfu1 a b c\n\nu2 a only\nu3 \xff b c\nu1 d e f\nu4 a b c d\n")
    found = scan([DataFile(str(path))])
    assert (found.users, found.records, found.items) == (2, 5, ["a", "b", "c", "d"])
    assert [(row["place"], row["field"]) for row in found.bad] == [(3, "items"), (4, ""), (5, "user")]
    assert "user u2 has 2 items" in found.bad[0]["problem"] and "at least 3" in found.bad[0]["fix"]
    assert "UTF-8 at byte 4" in found.bad[1]["problem"]
    assert found.bad[2]["problem"] == f"user u1 stands already in {path}, line 1"
    assert all((row["file"], row["unit"]) == (str(path), "line") and row["raw"] for row in found.bad)
    assert rows(path, "test") == [("a b", "c"), ("a b c", "d")]


def test_an_absent_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        scan([DataFile(str(tmp_path / "none.txt"))])
    with pytest.raises(DataError, match="not prepared from item sequences"):
        read_items(tmp_path / "items.parquet")


def test_only_text_files_hold_sequences(tmp_path: Path) -> None:
    text, lines = write(tmp_path, "u a b c"), write(tmp_path, "{}", "x.jsonl")
    found = find_sources(DataSection(train=str(tmp_path), format="sequences"))
    assert found.files["train"] == [DataFile(str(text))] and "x.jsonl" in found.notes[0]
    assert find_sources(DataSection(train=str(tmp_path))).files["train"] == [DataFile(str(lines))]
    with pytest.raises(DataError, match=r"unknown kind of file; convert it to \.txt"):
        find_sources(DataSection(train=str(lines), format="sequences"))
    (tmp_path / "test.txt").write_text("u a b c")
    with pytest.raises(DataError, match=r"holds test\.txt beside .* the last items of each user"):
        find_sources(DataSection(train=str(tmp_path), format="sequences"))


# -- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "digits"), [(3, 2), (100, 2), (101, 4), (3646, 4), (10_001, 6)])
def test_labels_are_different_numbers_of_an_even_width(items: int, digits: int) -> None:
    labels = label_items([f"item{n}" for n in range(items)], seed=1)
    assert {len(label) for label in labels.values()} == {digits}
    assert sorted(int(label) for label in labels.values()) == list(range(items))


def test_labels_follow_the_seed_and_say_nothing_of_the_order(tmp_path: Path) -> None:
    items = [f"{n:03d}" for n in range(200)]
    one = label_items(items, seed=1)
    assert one == label_items(items, seed=1) != label_items(items, seed=2)
    same_place = sum(int(item) == int(label) for item, label in one.items())
    assert same_place < 10
    write_items(one, tmp_path / "items.parquet")
    assert read_items(tmp_path / "items.parquet") == one


# -- the generated set --------------------------------------------------------------------------------------------


def test_generated_sequences_repeat_and_can_be_learned(tmp_path: Path) -> None:
    config = SequencesSection(users=300, items=60, clusters=6)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_generated(config, tmp_path / name, seed)
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c
    found = scan([DataFile(str(tmp_path / "a"))])
    assert (found.users, found.bad) == (300, []) and len(found.items) > 50
    following: dict[str, Counter[str]] = defaultdict(Counter)
    for line in a.splitlines():
        items = line.split()[1:]
        for item, next_item in pairwise(items):
            following[item][next_item] += 1
    seen = sum(sum(counts.values()) for counts in following.values())
    likely = sum(count for counts in following.values() for _, count in counts.most_common(SUCCESSORS)) / seen
    assert FOLLOW < likely < 0.95, "the last item says much about the next, and not all"


# -- tokens -------------------------------------------------------------------------------------------------------


def test_encoder_decoder_source_ends_with_the_end_token() -> None:
    tokenizer = make_tokenizer()
    config = DataSection(template="plain", plain_template="{prompt}")
    example = Example((Turn("user", "ab"),), "c", "c")
    plain = encode(example, config, tokenizer)
    joined = encode(example, config, tokenizer, encoder_decoder=True)
    assert plain is not None and joined is not None
    source, target = plain.input_ids[: plain.target_start], plain.input_ids[plain.target_start :]
    assert joined.input_ids == [*source, tokenizer.eos_token_id, *target]
    assert joined.target_start == plain.target_start + 1
    assert prompt_ids(example.turns, config, tokenizer, encoder_decoder=True) == joined.input_ids[: joined.target_start]
    assert completion_ids("c", tokenizer) == target


def test_the_cutoff_counts_source_and_target() -> None:
    tokenizer = make_tokenizer()

    def at(cutoff: int) -> int | None:
        config = DataSection(template="plain", plain_template="{prompt}", cutoff_tokens=cutoff)
        tokens = encode(Example((Turn("user", "abcd"),), "e", None), config, tokenizer, encoder_decoder=True)
        return None if tokens is None else len(tokens.input_ids)

    assert [at(cutoff) for cutoff in (5, 6, 7, 8)] == [None, 6, 7, 7]


def test_the_recipe_s_tokenizer_takes_digits_in_pairs(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ITEMS_MODEL)
    config = AutoConfig.from_pretrained(ITEMS_MODEL)
    assert len(tokenizer) == config.vocab_size == 103 and config.is_encoder_decoder
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (config.pad_token_id, config.eos_token_id) == (0, 1)
    path = write(tmp_path, "u " + " ".join(f"i{n}" for n in range(150)))
    found = scan([DataFile(str(path))])
    labels = label_items(found.items, seed=5)
    data = DataSection(template="plain", plain_template="{prompt}", format="sequences")
    (record,) = SequenceReader("test", labels, found.left_out, SequencesSection(history=3))(DataFile(str(path)))
    row = Encoder(data, tokenizer, 0, encoder_decoder=True).rows(record, held_out=True)[0]
    numbers = [int(labels[f"i{n}"]) for n in (146, 147, 148, 149)]
    pairs = [part + 3 for number in numbers for part in (number // 100, number % 100)]
    assert row["input_ids"] == [*pairs[:6], 1, *pairs[6:], 1] and row["target_start"] == 7
    assert tokenizer.decode(row["input_ids"][7:], skip_special_tokens=True) == row["answer"] == labels["i149"]


# -- plans and rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_estimate_counts_the_training_rows(tmp_path: Path, given: bool) -> None:
    path = tmp_path / "s.txt"
    sequences = SequencesSection(users=40, items=30, clusters=3, history=4)
    write_generated(sequences, path, seed=7)
    config = DataSection(
        format="sequences",
        train=str(path) if given else "embedded",
        template="plain",
        plain_template="{prompt}",
        sequences=sequences,
    )
    tokenizer = AutoTokenizer.from_pretrained(ITEMS_MODEL)
    found = estimate(config, tokenizer, sample_rows=10_000, seed=7, encoder_decoder=True)
    wanted = rows(path, "train", history=4)
    assert found is not None
    assert (found.rows, found.sampled) == (len(wanted), len(wanted))
    # items of two digits: one token each, an end token for source and target
    assert found.mean_tokens == pytest.approx(sum(len(p.split()) + 3 for p, _ in wanted) / len(wanted))
    assert found.mean_target_tokens == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"format": "sequences", "test": "x.txt"}}, "leave out validation and test"),
        ({"data": {"sequences": {"items": 10, "clusters": 6}}}, "at least twice"),
        ({"fusion": {"metric": "ranking"}}, r"needs data\.format sequences"),
        ({"fusion": {"ranking": {"cutoffs": [5, 20]}}}, "must contain 10"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(values)


def test_ranking_of_sequences_is_allowed() -> None:
    config = RunConfig(data=DataSection(format="sequences"), fusion=FusionSection(metric="ranking"))
    assert config.fusion.ranking.cutoffs == [5, 10, 20, 100]
