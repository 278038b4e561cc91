"""Data files to tokenised rows, in Ray's tasks: one task per file, rows in file order.

Invariant: every record of every file comes out exactly once, as an encoded row, as a row that is too long, or as a bad row
with its place, whatever exception it causes. Called by `prepare`, which needs Ray, and by plans, which use the `Encoder` alone.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from tc_ray.config.data import DataSection
from tc_ray.config.named import load_named
from tc_ray.config.yaml_file import ConfigError
from tc_ray.data.encode.prompts import readable_prompt
from tc_ray.data.encode.special_text import named_ids
from tc_ray.data.encode.tokenize import TemplateLacksError, encode
from tc_ray.data.source.files import DataFile
from tc_ray.data.source.records import BadRow, DataError, Record, quarantined
from tc_ray.data.source.shapes import Example, to_example
from tc_ray.data.source.task_form import TaskForm, load_task
from tc_ray.data.source.tasks import shaped
from tc_ray.data.source.templates import filled
from tc_ray.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 1024
_TEXTS = ("kind", "prompt", "completion", "answer", "key", "unit", "field", "problem", "fix", "raw")
_SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_start", pa.int32()),
        ("turn", pa.int16()),
        ("was_cut", pa.bool_()),
        ("options", pa.list_(pa.string())),
        *((name, pa.string()) for name in _TEXTS),
    ]
)
"""kind: row (encoded), long (prompt over the cut-off), bad (quarantined). turn: which answer to learn of its record, from 0."""


@dataclass
class Encoded:
    """Rows of one source: `rows` as in _SCHEMA with kind `row`, in file order; counts and bad rows of the rest.

    too_long: records whose prompt is over the cut-off. long_turns: later answers of conversations whose first one is not. sets: of a held-out part, by the name of a set (the column `set`), its rows that are too long and those that are bad.
    """

    rows: pa.Table
    too_long: int = 0
    long_turns: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    sets: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def largest_id(self) -> int:
        """The largest token id in use; -1 without rows."""
        found = pc.max(self.rows["input_ids"].combine_chunks().flatten()).as_py()
        return -1 if found is None else int(found)

    @property
    def cut_completions(self) -> int:
        """Rows whose completion was cut at the cut-off."""
        return int(pc.sum(self.rows["was_cut"]).as_py() or 0)

    @property
    def records(self) -> int:
        """Records read, bad ones included."""
        return int(pc.sum(pc.equal(self.rows["turn"], 0)).as_py() or 0) + self.too_long + len(self.bad)


@dataclass(frozen=True)
class Encoder:
    """Turns a record into a row of _SCHEMA (without `file`). Needs no Ray.

    task: form of the records; `for_task` sets it. encoder_decoder: the prompt is the encoder's source and ends with the end token. vocab_size: rows of the model's
    embedding; None: token ids are not checked.
    """

    config: DataSection
    tokenizer: PreTrainedTokenizerBase
    seed: int
    encoder_decoder: bool = False
    vocab_size: int | None = None
    task: TaskForm | None = None

    def for_task(self, name: str | None) -> Encoder:
        """The encoder of records of a task (`data.task`). Raises ConfigError: there is no such form."""
        return self if name is None else replace(self, task=load_task(name))

    def check(self) -> None:
        """Raise DataError when tokenizer and template do not fit, or the model does not embed the end or padding token."""
        tokenizer = self.tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token; set eos_token in the model folder's tokenizer_config.json")
        if self.config.template == "chat" and not tokenizer.chat_template:
            raise DataError("data.template is chat, but the tokenizer has no chat template; set data.template=plain")
        for token_id in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token_id is not None:
                self.check_id(token_id)

    def check_id(self, largest: int) -> None:
        """Raise DataError when the model does not embed `largest`, the largest token id in use: a tokenizer can hold more tokens.

        It would be an index error on a device. A larger embedding is padding, and a token that nothing uses needs no row.
        """
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise DataError(
                f"the tokenizer's token {self.tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, but the model "
                f"embeds {self.vocab_size} tokens (ids to {self.vocab_size - 1}); use the model's own tokenizer, or resize the "
                "embedding (model.resize_token_embeddings(len(tokenizer))) and save model and tokenizer again"
            )

    def rows(self, record: Record, *, held_out: bool) -> list[dict[str, Any]]:
        """One row for each answer to learn (held out: for the last one); a bad one, whatever exception the record causes.

        held_out: see `to_example`. Raises ConfigError: `data.convert` cannot be imported here.
        """
        try:
            found = self._rows(record, held_out)
        except ConfigError:  # the converter cannot be imported: no record is at fault
            raise
        except TemplateLacksError as error:
            fix = "take a model whose chat template knows tools and reasoning, or leave such records out"
            found = BadRow("messages", str(error), fix)
        except Exception as error:  # noqa: BLE001 - one record never ends a run; where all fail, they are too many bad ones
            fix = (
                "correct the record or leave it out; what the chat template refuses may be read by data.template=plain"
            )
            found = BadRow("", f"cannot be encoded: {_named(error)}", fix)
        if isinstance(found, BadRow):
            return [{"kind": "bad", **quarantined(record, found)}]
        return [{"place": record.place, "unit": record.unit, **row} for row in found]

    @cached_property
    def _convert(self) -> Callable[[Any], Any]:
        return load_named(self.config.convert or "", "data.convert")

    def _converted(self, value: Any) -> Any:
        """What `data.convert` makes of a record; a record that it raises an error for is bad."""
        convert = self._convert
        try:
            made = convert(value)
        except Exception as error:  # noqa: BLE001 - the user's code, on the user's record
            return BadRow("", f"data.convert fails: {_named(error)}", "correct the record, or data.convert")
        if not isinstance(made, dict):
            return BadRow("", f"data.convert gave {type(made).__name__}, no dict", "return a dict, or raise an error")
        return made

    def _rows(self, record: Record, held_out: bool) -> list[dict[str, Any]] | BadRow:
        value = record.value
        if self.config.convert is not None and not isinstance(value, BadRow):
            value = self._converted(value)
        if self.task is not None and not isinstance(value, BadRow):
            value = shaped(value, self.task)
        elif self.task is None:
            value = filled(value, self.config.templates)
        example = value if isinstance(value, BadRow) else to_example(value, held_out=held_out)
        if isinstance(example, BadRow):
            return example
        if misfit := self._misfit(example):
            return misfit
        replies = example.replies() if self.config.train_on == "all" and not held_out else example.replies()[-1:]
        rows = []
        for turn, reply in enumerate(replies):
            row = self._row(reply)
            if isinstance(row, BadRow):
                return row
            rows.append({**row, "turn": turn})
        return rows

    def _misfit(self, example: Example) -> BadRow | None:
        """What the run's settings cannot do with an example."""
        if example.renders and self.config.template == "plain":
            return BadRow(
                "messages", "holds tool calls or reasoning", "set data.template=chat: plain has no form for them"
            )
        if example.whole and self.encoder_decoder:
            return BadRow(
                "text", "has no prompt for the encoder", "give prompt + completion, or train a decoder-only model"
            )
        if example.whole and self.config.completion_pattern:
            return BadRow("text", "has no completion for data.completion_pattern", "leave the pattern out")
        texts = [text for turn in example.turns if (text := turn.content)]
        if self._not_embedded and (
            named := named_ids([*texts, example.completion or ""], self.tokenizer) & self._not_embedded
        ):
            name, fix = self.tokenizer.convert_ids_to_tokens(min(named)), "resize the model's embedding"
            return BadRow(
                "",
                f"names the special token {name!r}, whose id {min(named)} the model does not embed",
                f"{fix} (model.resize_token_embeddings(len(tokenizer))) and save both again, or leave the name out",
            )
        return None

    @cached_property
    def _not_embedded(self) -> set[int]:
        """Special tokens beyond the embedding. Their names would be read as plain text, like those of all special tokens."""
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return {i for i in special if self.vocab_size is not None and i >= self.vocab_size}

    def _row(self, example: Example) -> dict[str, Any] | BadRow:
        if self.config.completion_pattern and example.completion is not None:
            found = _with_pattern(example, self.config.completion_pattern)
            if isinstance(found, BadRow):
                return found
            example = found
        tokens = encode(example, self.config, self.tokenizer, self.encoder_decoder)
        if tokens is None:
            return {"kind": "long"}
        fewest = 1 if example.whole else 2  # of a completion the end token alone is none
        if (
            example.completion is not None
            and len(tokens.input_ids) < tokens.target_start + fewest
            and not tokens.was_cut
        ):
            return BadRow("completion", "has no tokens", "fill it in or leave the record out")
        completion = example.completion
        if example.more:  # as the chat template writes it
            ids = tokens.input_ids[tokens.target_start :]
            completion = self.tokenizer.decode(ids[: len(ids) - (ids[-1] == self.tokenizer.eos_token_id)])
        prompt = readable_prompt(example.turns)
        return {
            "kind": "row",
            "prompt": prompt,
            "completion": completion,
            "answer": example.answer,
            "options": list(example.options) or None,
            "input_ids": tokens.input_ids,
            "target_start": tokens.target_start,
            "was_cut": tokens.was_cut,
            "key": prompt_key(prompt or example.completion or "", self.seed),
        }


def encode_files(
    files: Sequence[DataFile], encoder: Encoder, read: Callable[[DataFile], Iterable[Record]], *, held_out: bool
) -> Encoded:
    """Read, check and tokenise `files` in Ray's tasks.

    Args:
        read: yields the records of one file in order, its bad ones included.

    Raises DataError: a file cannot be read at all.
    """

    def encode_one(path: DataFile) -> pa.Table:
        return _encode_file(path, encoder, read, held_out)

    tables = [_SCHEMA.empty_table(), *_in_ray(encode_one, files)]
    table = pa.concat_tables(
        [
            part.append_column("file", pa.array([number] * len(part), pa.int32()))
            for number, part in enumerate(tables, -1)
        ]
    )
    of_kind = {kind: table.filter(pc.equal(table["kind"], kind)) for kind in ("row", "long", "bad")}
    shown = ("unit", "place", "field", "problem", "fix", "raw")
    bad = [{"file": str(files[row["file"]]), **{n: row[n] for n in shown}} for row in of_kind["bad"].to_pylist()]
    too_long = pc.sum(pc.equal(of_kind["long"]["turn"], 0)).as_py() or 0
    return Encoded(of_kind["row"].combine_chunks(), too_long, of_kind["long"].num_rows - too_long, bad)


def joined(sets: Mapping[str, Encoded]) -> Encoded:
    """The sets of one part in order, each row with the name of its set."""
    return Encoded(
        pa.concat_tables([named(found.rows, name) for name, found in sets.items()]).combine_chunks(),
        sum(found.too_long for found in sets.values()),
        0,
        [row for found in sets.values() for row in found.bad],
        {name: (found.too_long, len(found.bad)) for name, found in sets.items()},
    )


def named(rows: pa.Table, name: str) -> pa.Table:
    """The rows with the name of their set."""
    return rows.append_column("set", pa.array([name] * rows.num_rows, pa.string()))


def _in_ray(encode_one: Callable[[DataFile], pa.Table], files: Sequence[DataFile]) -> list[pa.Table]:
    import ray

    task = ray.remote(encode_one)
    try:
        return list(ray.get([task.remote(file) for file in files]))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _encode_file(
    path: DataFile, encoder: Encoder, read: Callable[[DataFile], Iterable[Record]], held_out: bool
) -> pa.Table:
    tables = [_SCHEMA.empty_table()]
    try:
        records = iter(read(path))
        while chunk := list(islice(records, _CHUNK_ROWS)):  # Python's lists of ids take ten times the space of Arrow's
            rows = [row for record in chunk for row in encoder.rows(record, held_out=held_out)]
            tables.append(pa.Table.from_pylist(rows, schema=_SCHEMA))
        return pa.concat_tables(tables)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read: {_named(error)}") from error


def _with_pattern(example: Example, pattern: str) -> Example | BadRow:
    """The example with the part of its completion that data.completion_pattern takes."""
    found = re.search(pattern, example.completion or "")
    text = found and found.group(found.re.groups)
    if not text or not text.strip():
        problem = f"data.completion_pattern {pattern!r} takes no text of it"
        return BadRow("completion", problem, "correct the pattern (its last group must hold text) or the row")
    return replace(example, completion=text)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def prompt_key(prompt: str, seed: int) -> str:
    """16 hex digits: equal for equal prompts, in random order for different ones."""
    folded = " ".join(prompt.casefold().split())
    return hashlib.sha256(f"{seed}\0{folded}".encode()).hexdigest()[:16]


def row_count(size: float, rows: int) -> int:
    """Rows of a `size` setting: a fraction below 1, else a count."""
    return round(size * rows) if size < 1 else int(size)


def cut(keys: Sequence[str], validation: float, test: float) -> list[str]:
    """Part of each row: "train", "validation" or "test".

    `validation` and `test` are sizes as in the config (0: none); a size above 0 gives at least one row. All rows of a
    prompt stay together, so a part can exceed its size by the copies of one prompt.

    Raises DataError: no training row is left.
    """
    copies = Counter(keys)
    part_of: dict[str, str] = {}
    order = iter(sorted(copies))
    for part, size in (("test", test), ("validation", validation)):
        wanted = max(row_count(size, len(keys)), 1) if size else 0
        taken = 0
        while taken < wanted:
            key = next(order, None)
            if key is None:
                break
            part_of[key] = part
            taken += copies[key]
    parts = [part_of.get(key, "train") for key in keys]
    if "train" not in parts:
        raise DataError(
            f"{len(keys)} rows with {len(copies)} different prompts leave nothing to train on after the cut; "
            f"lower data.validation_size ({validation:g}) and data.test_size ({test:g}), or give more data"
        )
    return parts
