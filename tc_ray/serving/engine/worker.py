"""What the engine's thread does in a round: admit, compute prompts, one token for every sequence, and scores.

Invariants: sequences are admitted in the order of arrival, each when the caches hold it to its last token; the caches never
pass `limits.cache_bytes`, except for the moment in which one is copied to a larger block. An error in the batch fails the
sequences in it and no others; one in a pass over several prompts fails these. A request enters the batch in `_join`.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from tc_ray.config.serving import ServingSection
from tc_ray.models.decoding.batch import CacheNeed, FusedBatch
from tc_ray.models.decoding.prefill import Prefill, advance_together, encoded
from tc_ray.models.weights import NotFiniteError
from tc_ray.serving.engine.contract import GenerationRequest, Load, Request, RequestHandle, Scored
from tc_ray.serving.engine.prefixes import Prefixes
from tc_ray.serving.engine.scoring import scored
from tc_ray.serving.engine.sequence import Sequence, end_ids_of
from tc_ray.serving.errors import RequestError

logger = logging.getLogger(__name__)
_NOT_FINITE = "logits that are not finite"
_UNLIKE = 1 / 16
"""Prompts computed in one pass differ in length from the first by this share at most: padding costs what a pass saves."""
_DELAY = 2.0
"""A long prompt holds up the tokens of others by so many of their steps at most, or by its least part."""
_LEAST = 16
"""Tokens of the least part at a prompt's beginning: the weights are read in any case. Far behind, attention is most of the work."""


class Worker:
    """The sequences and scorings under way, and the batch.

    lock: held while a request moves from one list to another, so that other threads count it once.
    """

    def __init__(self, model: Any, tokenizer: Any, limits: ServingSection, lock: AbstractContextManager[Any]) -> None:
        self.limits, self.end_ids = limits, end_ids_of(model, tokenizer)
        self._model, self._tokenizer, self._lock = model, tokenizer, lock
        self.batch, config = FusedBatch(model), model.pilot.config
        self._device, self._prefixes = model.get_input_embeddings().weight.device, Prefixes(limits.prefix_bytes)
        self._source: tuple[tuple[bytes, tuple[int, ...]], torch.Tensor] | None = None
        """Owner and ids of the source read last, and the encoder's output."""
        self._start = (config.decoder_start_token_id,) if model.family.encoder_decoder else ()
        if self._device.type == "cpu":
            # transformers' own switch: with a mask its sdpa copies keys and values for every head, which this kernel does not need
            os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
        weights = sum(parameter.numel() for parameter in model.pilot.parameters())
        self._even_tokens = weights / (2 * config.num_hidden_layers * config.hidden_size)
        """Context at which attention costs as much as the weights: 2 flops a weight, 4 flops a layer, channel and token before."""
        self._joining: deque[Sequence] = deque()
        """Admitted; their prompts are being computed."""
        self._running: list[Sequence] = []
        """In the order of the batch's rows."""
        self._scoring: deque[tuple[RequestHandle, Iterator[Scored | None]]] = deque()
        self._step_s = self._used_s = self._pace = 0.0
        """Seconds of the last step, and of this round's prompts; prompt tokens per second in the pass before."""
        self._totals = Load(0, 0, 0, limits.cache_bytes)
        self.last_progress_s = time.monotonic()
        self.failures = 0
        """Since the last request that was completed."""

    def __len__(self) -> int:
        return len(self._running) + len(self._joining) + len(self._scoring)

    def load(self) -> Load:
        """Totals since the start, sequences under way and bytes held; `waiting` is 0."""
        return replace(self._totals, running=len(self), cache_bytes=self.batch.nbytes)

    def progress(self) -> None:
        """Something was computed just now, or there was nothing to compute."""
        self.last_progress_s = time.monotonic()

    def lam_of(self, request: GenerationRequest) -> float:
        """Weight of the Copilot."""
        return float(self._model.default_lam if request.lam is None else request.lam)

    def need_of(self, request: GenerationRequest) -> CacheNeed:
        """Cache entries of a request up to its last token."""
        return self.batch.need(len(request.prompt_ids), request.max_new_tokens, self.lam_of(request) != 0)

    def fits(self, request: Request) -> bool:
        """Whether a request can be admitted now."""
        if not isinstance(request, GenerationRequest):
            return True
        needs = [sequence.need for sequence in (*self._joining, *self._running)]
        if len(needs) >= self.limits.max_running:
            return False
        return self.batch.planned_bytes([*needs, self.need_of(request)]) <= self.limits.cache_bytes

    def admit(self, handle: RequestHandle) -> None:
        """Take a request that fits."""
        request = handle.request
        if isinstance(request, GenerationRequest):
            end_ids = request.end_ids | (frozenset() if request.ignore_end else self.end_ids)
            lam, need = self.lam_of(request), self.need_of(request)
            before = self._start or request.prompt_ids
            self._joining.append(Sequence(handle, self._tokenizer, end_ids, lam, need, before))
        else:
            self._scoring.append((handle, scored(self._model, request, self.limits.prefill_tokens, self._encoded)))

    def drop_gone(self, now_s: float) -> None:
        """Remove what was cancelled or is past its deadline."""
        self._joining = deque(sequence for sequence in self._joining if not sequence.handle.gone(now_s))
        self._scoring = deque(item for item in self._scoring if not item[0].gone(now_s))
        for row in reversed(range(len(self._running))):
            if self._running[row].handle.gone(now_s):
                self._leave(row)

    def clear(self) -> list[RequestHandle]:
        """Remove everything; returns the handles."""
        handles = [sequence.handle for sequence in (*self._joining, *self._running)]
        handles += [handle for handle, _ in self._scoring]
        for held in (self._joining, self._running, self._scoring):
            held.clear()
        return handles

    def round(self) -> None:
        """Compute prompts (work of at most `prefill_tokens`), one token for every sequence, and a part of one scoring."""
        self._compute_prompts()
        if self._running:
            began_s = time.monotonic()
            self._step()
            self._step_s = time.monotonic() - began_s
        if self._scoring:
            self._score()

    def _compute_prompts(self) -> None:
        """Half of the work for the oldest prompt, the rest for the shortest ones: a short one does not wait for a long one's end."""
        if not self._joining:
            return
        self._used_s = 0.0
        oldest, *others = self._joining
        if self._start or self.limits.prefix_bytes:  # what is kept of one saves the others' computation
            others = [other for place, other in enumerate(others) if not other.begins_like(oldest, *others[:place])]
        others.sort(key=lambda sequence: sequence.prompt_left)
        left = float(self.limits.prefill_tokens)
        left -= self._compute(oldest, left / 2 if others else left, others, at_least=1)
        for place, other in enumerate(others):
            if other not in self._joining:
                continue
            # one begun prompt beside the oldest holds caches of its own; another may only be begun to be ended at once
            if other.prefill or other.prompt_left <= left or not any(one.prefill for one in others):
                left -= self._compute(other, left, others[place + 1 :])
        if oldest in self._joining:
            self._compute(oldest, left)

    def _compute(
        self, sequence: Sequence, work: float, others: list[Sequence] | None = None, at_least: int = 0
    ) -> float:
        """Compute a part of a prompt, or the whole one and those of `others` that are like it in one pass; returns the work.

        A token far behind the beginning is more work: it attends to more.
        """
        cost = 1 + (sequence.prefill.computed if sequence.prefill else 0) / self._even_tokens
        tokens = self._bounded(sequence, max(at_least, int(work / cost)), max(1, int(_LEAST / cost)))
        if not tokens:
            return 0.0
        spent, sequences = 1.0, self._alike(sequence, others or [], tokens)
        try:
            prefills = [one.prefill or self._begin(one) for one in sequences]
            before, began_s = sum(prefill.computed for prefill in prefills), time.monotonic()
            count = prefills[0].advance(tokens) if len(prefills) == 1 else advance_together(prefills)
            spent = cost * count
            if self._device.type == "cuda":  # the device is still computing
                torch.cuda.synchronize(self._device)
            seconds = time.monotonic() - began_s
            self._used_s += seconds
            sequence.pace = self._pace = count / max(seconds, 1e-9)
            self._count(prompt_tokens=sum(prefill.computed for prefill in prefills) - before)
        except Exception as error:  # noqa: BLE001 - logged, and reported to the clients
            self._drop(error, sequences)
            return spent
        for one, prefill in zip(sequences, prefills, strict=True):
            try:
                if prefill.done and not self._join(one, prefill):
                    self._joining.remove(one)
            except Exception as error:  # noqa: BLE001 - logged, and reported to the client
                self._drop(error, [one])
        return spent

    def _bounded(self, sequence: Sequence, tokens: int, least: int) -> int:
        """Of `tokens`, as many as a prompt that takes several rounds may compute in this one; measured, as its parts cost ever more.

        least: smaller parts save too little time.
        """
        if not self._running or not (sequence.prefill or tokens < sequence.prompt_left):
            return tokens
        most = int((_DELAY * self._step_s - self._used_s) * (sequence.pace or self._pace))
        if most < least:
            most = 0 if self._used_s else least
        return min(tokens, most)

    def _drop(self, error: Exception, sequences: list[Sequence]) -> None:
        """Fail prompts that are being computed."""
        self._fail(error, [sequence.handle for sequence in sequences])
        for sequence in sequences:
            self._joining.remove(sequence)

    def _alike(self, first: Sequence, others: list[Sequence], tokens: int) -> list[Sequence]:
        """`first`, and those of `others` whose prompts are computed in its pass: whole ones of like length, none begun, without a
        prefix, of at most `tokens` tokens with their padding."""
        length, found = len(first.request.prompt_ids), [first]
        if not self._whole(first):
            return found
        for other in others:
            longest = max(len(one.request.prompt_ids) for one in (*found, other))
            like = abs(len(other.request.prompt_ids) - length) <= length * _UNLIKE
            corrected = bool(other.lam) == bool(first.lam)
            if like and corrected and longest * (len(found) + 1) <= tokens and self._whole(other):
                found.append(other)
        return found

    def _whole(self, sequence: Sequence) -> bool:
        """The prompt waits, nothing of it is computed or kept, and it is the decoder that reads it."""
        request = sequence.request
        if sequence not in self._joining or sequence.prefill or self._start:
            return False
        return self._prefixes.longest(request.prompt_ids, request.owner) is None

    def _begin(self, sequence: Sequence) -> Prefill:
        ids, owner = sequence.request.prompt_ids, sequence.request.owner
        if self._start:
            held = self._source is not None and self._source[0] == (owner, ids)
            prefill = Prefill(self._model, ids, sequence.lam, question=self._encoded(ids, owner))
            if held:
                prefill.reused = prefill.computed = len(ids) - 1
        else:
            prefill = Prefill(self._model, ids, sequence.lam, self._prefixes.longest(ids, owner))
        self._count(cached_tokens=prefill.reused)
        sequence.prefill = prefill
        return prefill

    def _encoded(self, ids: tuple[int, ...], owner: bytes) -> torch.Tensor:
        """The encoder's output for a source, made once for what follows each other: choices, and completions to be scored."""
        if self._source is None or self._source[0] != (owner, ids):
            self._source = (owner, ids), encoded(self._model, ids)
        return self._source[1]

    def _join(self, sequence: Sequence, prefill: Prefill) -> bool:
        """Send the first token of a computed prompt; the sequence enters the batch if more follow. Returns whether it did."""
        pilot, fused = prefill.pilot[0], prefill.fused[0]
        if not fused.max().isfinite():
            raise NotFiniteError(_NOT_FINITE)
        # only after the check: a prompt with bad states must not spoil later requests
        self._prefixes.keep(prefill, sequence.request.owner)
        chosen = sequence.choose(fused, int(fused.argmax()))
        self._count(generated_tokens=1)
        if sequence.append(chosen, pilot, fused):
            self.failures = 0
            return False
        try:
            self.batch.reserve([other.need for other in (*self._running, sequence)], self.limits.cache_bytes)
            self.batch.join(prefill)
        except Exception as error:
            self._replace_batch(error)
            raise
        sequence.prefill = None  # its keys and values are in the batch now
        with self._lock:
            self._joining.remove(sequence)
            self._running.append(sequence)
        return True

    def _step(self) -> None:
        ended, broken = [], []
        try:
            step = self.batch.step([sequence.last for sequence in self._running])
            best, likeliest = (found.tolist() for found in step.fused.max(1))
            for row, sequence in enumerate(self._running):
                if not math.isfinite(
                    best[row]
                ):  # `max` gives NaN where there is one; tokens of probability 0 have -inf
                    broken.append(row)
                    continue
                fused = step.fused[row]
                pilot = fused if step.pilot is step.fused else step.pilot[row]
                try:
                    chosen = sequence.choose(fused, likeliest[row])
                except NotFiniteError:
                    broken.append(row)
                    continue
                if sequence.append(chosen, pilot, fused):
                    ended.append(row)
        except Exception as error:  # noqa: BLE001 - logged, and reported to the clients
            self._replace_batch(error)
            return
        self._count(generated_tokens=len(self._running), steps=1)
        if ended:
            self.failures = 0
        if broken:
            self._fail(NotFiniteError(_NOT_FINITE), [self._running[row].handle for row in broken])
        for row in sorted(ended + broken, reverse=True):
            self._leave(row)

    def _score(self) -> None:
        handle, parts = self._scoring[0]
        try:
            with torch.inference_mode():
                found = next(parts)
        except Exception as error:  # noqa: BLE001 - logged, and reported to the client
            self._scoring.popleft()
            self._fail(error, [handle])
            return
        self.progress()
        if found is not None:  # the next scoring starts only now: the states of one text are in memory at a time
            self.failures = 0
            self._scoring.popleft()
            handle.end(found)

    def _replace_batch(self, error: Exception) -> None:
        """Fail everything in the batch, whose caches may be half written, and start a new one."""
        failed, self._running = self._running, []
        self.batch = FusedBatch(self._model)
        self._fail(error, [sequence.handle for sequence in failed])

    def _fail(self, error: Exception, handles: list[RequestHandle]) -> None:
        logger.error("generation failed", exc_info=error)
        self.failures += 1
        for handle in handles:
            message = f"Generation failed in the server ({type(error).__name__})."
            handle.end(RequestError(message, status=500, code="generation_failed"))

    def _leave(self, row: int) -> None:
        self.batch.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _count(self, **more: int) -> None:
        self.progress()
        self._totals = replace(self._totals, **{name: getattr(self._totals, name) + n for name, n in more.items()})
