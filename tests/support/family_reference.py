"""Reference for every family: the equations of the models, the Copilot and fused decoding, slow and obvious.

One sequence at a time, no cache, no padding, no batching, no hooks, dense errors; every step of a decoding is computed anew from
the whole sequence. Of the product only the Copilot's weights are used (the modules that hold them). The Pilot's forward is
the library's; what the library does not hand out, the output of the last layer before the final norm, and the Copilot's
layers are those of tests/support/family_layers.py, written out from each family's definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.support.family_layers import decoder_layer, final_norm, layer_types, position_bias, rms, t5_block

MEMORY_EPS = 1e-6
"""Of the norms on the Copilot's memory."""


# -- the Pilot ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PilotPass:
    """What the Pilot makes of a prompt and n target tokens.

    logits: [n + 1, V], row i predicts target token i (the last row what follows). question: X~ [Q, d_P].
    states: [P, d_P] pooled over layers; positions: the position of each in the joined sequence.
    layers: [L, P, d_P] the outputs of all layers.
    """

    logits: torch.Tensor
    question: torch.Tensor
    states: torch.Tensor
    positions: list[int]
    layers: torch.Tensor

    def row_positions(self) -> list[int]:
        """Position whose state predicts target token i, for each row of `logits`."""
        return self.positions[len(self.positions) - len(self.logits) :]


def pooled(layers: torch.Tensor, pooling: str) -> torch.Tensor:
    """[L, P, d] -> [P, d]."""
    out = layers[0]
    for layer in layers[1:]:
        out = torch.maximum(out, layer) if pooling == "max" else out + layer
    return out / len(layers) if pooling == "mean" else out


def embedding_table(model: Any) -> torch.Tensor:
    """Token embeddings [V, d] as the layers see them: Gemma multiplies by sqrt(d)."""
    table = model.get_input_embeddings().weight.detach()
    return table * math.sqrt(table.shape[1]) if model.config.model_type.startswith("gemma") else table


@torch.no_grad()
def pilot_pass(model: Any, prompt: list[int], target: list[int], pooling: str = "mean") -> PilotPass:
    """One forward of the library's model; the last layer is run once more by hand for its output before the norm."""
    asked = torch.tensor([prompt])
    if model.config.is_encoder_decoder:
        given = torch.tensor([[model.config.decoder_start_token_id, *target]])
        out = model(input_ids=asked, decoder_input_ids=given, use_cache=False, output_hidden_states=True)
        question, entries = out.encoder_last_hidden_state[0], out.decoder_hidden_states
        logits, first = out.logits[0], len(prompt) - 1
        decoder = model.get_decoder()
        table = decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias = position_bias(table, given.shape[1], model.config)
        everything = torch.ones(given.shape[1], len(prompt), dtype=torch.bool)
        last = t5_block(decoder.block[-1], model.config, entries[-2][0], question, bias, everything)
        norm = decoder.final_layer_norm
    else:
        given = torch.tensor([prompt + target])
        out = model(input_ids=given, use_cache=False, output_hidden_states=True)
        question, entries = embedding_table(model)[asked[0]], out.hidden_states
        logits, first = out.logits[0, len(prompt) - 1 :], 0
        decoder = model.get_decoder()
        causal = torch.ones(given.shape[1], given.shape[1], dtype=torch.bool).tril()
        kind = layer_types(model.config)[-1]
        last = decoder_layer(decoder.layers[-1], model.config, kind, entries[-2][0], None, causal)
        norm = decoder.norm
    # the library's last entry is after the final norm
    torch.testing.assert_close(final_norm(norm, model.config, last), entries[-1][0], rtol=1e-4, atol=1e-4)
    layers = torch.stack([*(entry[0] for entry in entries[1:-1]), last])
    return PilotPass(logits, question, pooled(layers, pooling), list(range(first, first + given.shape[1])), layers)


def dense_errors(logits: torch.Tensor, target: list[int]) -> torch.Tensor:
    """l_i = onehot(token i) - softmax(logits that predict it), [n, V]."""
    rows = []
    for row, token in zip(logits, target, strict=False):
        truth = torch.zeros_like(row)
        truth[token] = 1.0
        rows.append(truth - row.softmax(-1))
    return torch.stack(rows) if rows else torch.zeros(0, logits.shape[1])


# -- the Copilot --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """How a Copilot was made, said by the test and not read from the Copilot.

    base: the library's model its layers `layers` come from. pilot: the Pilot it was made beside. form: fields of
    `copilot.form` that are not the default.
    """

    pilot: Any
    base: Any
    layers: tuple[int, ...]
    pattern: str = "alternate"
    form: dict[str, Any] = field(default_factory=dict)

    def attends_to_memory(self, j: int) -> bool:
        """Whether layer j of a decoder-only Copilot (from 0) reads the memory instead of the rows."""
        n = len(self.layers)
        return {"alternate": j % 2 == 1, "early": j < n // 2, "late": j >= n - n // 2, "all": True}[self.pattern]

    def error_table(self) -> torch.Tensor:
        """E_C [V, d_C]: the Pilot's table if it is as wide as the base, else the base's, zero for ids it does not have."""
        table, own = embedding_table(self.pilot), embedding_table(self.base)
        if table.shape[1] == own.shape[1]:
            return table
        rows = torch.zeros(len(table), own.shape[1])
        common = min(len(table), len(own))
        rows[:common] = own[:common]
        return rows


def copilot_f(
    copilot: Any,
    made: Made,
    question: torch.Tensor,
    states: torch.Tensor,
    positions: list[int],
    row_positions: list[int],
    errors: torch.Tensor,
) -> torch.Tensor:
    """f [n, V] of one sequence, from dense errors.

    Args:
        question: X~ [Q, d_P]. states: [P, d_P], that of position `positions[j]` in row j.
        row_positions: for each of the n rows the position whose state predicts its token.
        errors: [at least n - 1, V]; row i reads errors[i - 1].
    """
    config, table, form = made.base.config, made.error_table(), made.form
    numbered, normed = form.get("row_positions", True), form.get("memory_norm", True)
    producing = form.get("producing_state", "input")
    asked, shown = question, states
    if normed:
        asked = rms(question, copilot.question_norm.weight, MEMORY_EPS)
        shown = rms(states, copilot.rationale_norm.weight, MEMORY_EPS)

    rows = []
    for i, position in enumerate(row_positions):
        if i == 0:
            row = torch.zeros(table.shape[1]) if form.get("start_row") == "zeros" else copilot.start.weight[0]
        elif form.get("error_input") == "free":  # W_in l
            row = copilot.error_embedding.weight.T @ errors[i - 1]
        else:  # W_in l = A E^T l
            row = copilot.error_projection.weight @ (table.T @ errors[i - 1])
        if producing == "input":
            row = row + copilot.state_projection.weight @ shown[positions.index(position)]
        rows.append(row)
    x = torch.stack(rows)

    memory = torch.cat([asked, shown])
    if table.shape[1] != states.shape[1]:
        memory = memory @ copilot.memory_projection.weight.T
    sees_memory = torch.ones(len(x), len(memory), dtype=torch.bool)
    for i, position in enumerate(row_positions):
        for j, at in enumerate(positions):
            sees_memory[i, len(question) + j] = at < position if producing == "unseen" else at <= position
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()

    if config.is_encoder_decoder:
        bias = None
        if numbered:
            table_of_distances = copilot.layers[0].layer[0].SelfAttention.relative_attention_bias.weight
            bias = position_bias(table_of_distances, len(x), config)
        for block in copilot.layers:
            x = t5_block(block, config, x, memory, bias, sees_memory)
        norm = copilot.stack.final_layer_norm
    else:
        types = layer_types(config)
        for j, (layer, index) in enumerate(zip(copilot.layers, made.layers, strict=True)):
            if made.attends_to_memory(j):
                x = decoder_layer(layer, config, types[index], x, memory, sees_memory, memory_norm=normed)
            else:
                x = decoder_layer(layer, config, types[index], x, None, causal, numbered=numbered)
        norm = copilot.stack.norm
    x = final_norm(norm, config, x)
    if form.get("scaled_output", True):
        x = x / math.sqrt(x.shape[1])
    f = torch.zeros(len(x), len(table))  # 0 for tokens that W_out has no row for
    f[:, copilot.output_ids] = x @ copilot.output.weight.T
    return f


def rmse(f: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Equation 7: root of the mean over tokens of the squared error summed over V."""
    return torch.sqrt(((f - errors) ** 2).sum() / len(f))


# -- fused decoding -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fusion:
    """p~ of a Pilot and a Copilot (None: the Pilot alone), all of it computed anew for every token."""

    pilot: Any
    copilot: Any
    made: Made
    lam: float
    space: str = "probability"
    feedback: str = "own"
    pooling: str = "mean"
    positions: str = "all"
    tap_layers: Sequence[int] | None = None

    @torch.no_grad()
    def logits(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """Logits of p~ [n + 1, V] for each of n given tokens and the one after (equation 8)."""
        seen = pilot_pass(self.pilot, prompt, tokens, self.pooling)
        if self.tap_layers is not None:
            seen = replace(seen, states=pooled(seen.layers[list(self.tap_layers)], self.pooling))
        if self.lam == 0:
            return seen.logits
        if self.feedback == "own":  # f_i depends on f_0 .. f_{i-1}: one row more at a time
            errors = torch.zeros(0, seen.logits.shape[1])
            for rows in range(1, len(tokens) + 1):
                errors = self._f(seen, rows, errors)
        else:  # what was said, against what the Pilot thought
            errors = dense_errors(seen.logits, tokens)
        f = self._f(seen, len(tokens) + 1, errors)
        if self.space == "logits":
            return seen.logits + self.lam * f
        mass = torch.clamp(seen.logits.softmax(-1) + self.lam * f, min=0)
        return torch.log(mass / mass.sum(-1, keepdim=True))

    def _f(self, seen: PilotPass, rows: int, errors: torch.Tensor) -> torch.Tensor:
        """f of the first `rows` rows. States of later rows stand in the memory, but no row sees a later state."""
        at = seen.row_positions()
        kept = [j for j, position in enumerate(seen.positions) if self.positions == "all" or position >= at[0]]
        positions = [seen.positions[j] for j in kept]
        return copilot_f(self.copilot, self.made, seen.question, seen.states[kept], positions, at[:rows], errors)


def greedy(fusion: Fusion, prompt: list[int], steps: int, end: int | None = None) -> list[int]:
    """The likeliest token, again and again."""
    tokens: list[int] = []
    while len(tokens) < steps and (not tokens or tokens[-1] != end):
        tokens.append(int(fusion.logits(prompt, tokens)[-1].argmax()))
    return tokens


def beam_search(
    log_probs: Callable[[list[int]], torch.Tensor], *, beams: int, steps: int, end: int, length_penalty: float
) -> list[tuple[float, list[int]]]:
    """Beam search as transformers defines it with early_stopping False: (score, tokens), best first.

    log_probs: log p of every next token, [V], after these tokens. A finished hypothesis scores its summed log-probability
    divided by length^length_penalty, the end token counted. The best `beams` of the best 2 x `beams` continuations may
    finish; the search ends when no running one can do better at its present length than the worst of `beams` finished.
    """
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, steps + 1):
        candidates = [
            (score + float(value), [*tokens, token])
            for score, tokens in running
            for token, value in enumerate(log_probs(tokens).tolist())
        ]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beams]
        ended = [c for c in candidates[:beams] if c[1][-1] == end or length == steps]
        finished += [(score / length**length_penalty, tokens) for score, tokens in ended]
        finished = sorted(finished, key=lambda c: -c[0])[:beams]
        running = [c for c in candidates if c[1][-1] != end][:beams]
        if len(finished) == beams and running[0][0] / length**length_penalty <= finished[-1][0]:
            break
    return finished
