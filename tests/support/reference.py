"""Reference for the numerics: the equations of the paper, slow and obvious, one sequence at a time.

No Ray, no cache, no hooks, no padding, no sparse errors, no batching: every quantity is dense and every step of a decoding is
computed anew from the whole sequence. Of the product only the weights are used (the modules that hold them), never its
attention, masks, taps, error arithmetic or caches. Used by the tests that compare the real path with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

NORM_EPS = 1e-6
"""Of the norms on the Copilot's memory."""


@dataclass(frozen=True)
class DenseRecord:
    """Record of one example: errors l [n, V], states [S, d] (mean over layers), logits [n, V], loss [n], all fp32."""

    errors: torch.Tensor
    states: torch.Tensor
    logits: torch.Tensor
    token_loss: torch.Tensor


def pilot_pass(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [S, V] and layer-mean hidden states [S, d] of a causal language model on one sequence.

    The library's last entry of `hidden_states` is after the final norm, so the last layer is run once more by hand.
    """
    base = model.get_decoder()
    out = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    entries = out.hidden_states  # embeddings, layer 1, ..., layer L-1, norm(layer L)
    positions = torch.arange(len(ids))[None]
    future = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
    last = base.layers[-1](
        entries[-2], attention_mask=future, position_embeddings=base.rotary_emb(entries[-2], positions)
    )
    last = last[0] if isinstance(last, tuple) else last
    torch.testing.assert_close(base.norm(last), entries[-1], rtol=1e-4, atol=1e-4)
    outputs = [*entries[1:-1], last]
    mean = sum(state[0] for state in outputs) / len(outputs)
    return out.logits[0], mean


@torch.no_grad()
def dense_record(model: Any, ids: list[int], target_start: int) -> DenseRecord:
    """What the Pilot leaves for one example: l_i = onehot(token i) - softmax(logits that predict it)."""
    logits, states = pilot_pass(model, ids)
    rows, losses = [], []
    for position in range(target_start, len(ids)):
        p = logits[position - 1].softmax(-1)
        truth = torch.zeros_like(p)
        truth[ids[position]] = 1.0
        rows.append(truth - p)
        losses.append(torch.nn.functional.cross_entropy(logits[position - 1], torch.tensor(ids[position])))
    return DenseRecord(torch.stack(rows), states, logits[target_start - 1 : -1], torch.stack(losses))


def rms_normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last axis."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions 0, 1, ... on [rows, heads, width]: the two halves of a head are the two coordinates."""
    rows, _, width = x.shape
    half = width // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = torch.arange(rows, dtype=torch.float32) * theta ** (-2.0 * i / width)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


def attention(
    layer: Any, queries: torch.Tensor, memory: torch.Tensor, visible: torch.Tensor, theta: float | None
) -> torch.Tensor:
    """Softmax attention of normed rows [n, d] to normed memory [M, d]; `visible` bool [n, M]; theta None: no positions."""
    own = layer.self_attn
    width = own.head_dim
    q = own.q_proj(queries).view(len(queries), -1, width)
    k = own.k_proj(memory).view(len(memory), -1, width)
    v = own.v_proj(memory).view(len(memory), -1, width)
    if theta is not None:
        q, k = turned(q, theta), turned(k, theta)
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        outputs = []
        for row in range(len(queries)):
            seen = visible[row].nonzero()[:, 0]
            scores = (k[seen, head // group] @ q[row, head]) / math.sqrt(width)
            outputs.append(scores.softmax(-1) @ v[seen, head // group])
        heads.append(torch.stack(outputs))
    return own.o_proj(torch.cat(heads, -1))


def copilot_f(
    copilot: Any,
    question: list[int],
    states: torch.Tensor,
    state_positions: list[int],
    row_positions: list[int],
    errors: torch.Tensor,
    *,
    asked: torch.Tensor | None = None,
) -> torch.Tensor:
    """f [n, V] of one example, from dense errors.

    Args:
        question: prompt tokens. states: [P, d_P], the state of `state_positions[j]` in row j.
        row_positions: for each of the n rows the position whose state predicts its token.
        errors: [at least n - 1, V]; row i reads errors[i - 1].
        asked: X~ [Q, d_P], where it does not follow from `question`.
    """
    config = copilot.config.decoder_config()
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    same = copilot.error_embedding is None
    embedding = (copilot.question_embedding if same else copilot.error_embedding).weight
    normed_states = rms_normalised(states, copilot.rationale_norm.weight, NORM_EPS)

    rows = []
    for i, position in enumerate(row_positions):
        # W_in l = A E^T l
        row = copilot.start.weight[0] if i == 0 else copilot.error_projection.weight @ (embedding.T @ errors[i - 1])
        if copilot.state_projection is not None:
            row = row + copilot.state_projection.weight @ normed_states[state_positions.index(position)]
        rows.append(row)
    x = torch.stack(rows)

    if asked is None:
        asked = copilot.question_embedding.weight[torch.tensor(question)]
    memory = torch.cat([rms_normalised(asked, copilot.question_norm.weight, NORM_EPS), normed_states])
    memory = copilot.memory_projection(memory)
    sees_memory = torch.zeros(len(x), len(memory), dtype=torch.bool)
    sees_rows = torch.zeros(len(x), len(x), dtype=torch.bool)
    for i, position in enumerate(row_positions):
        sees_memory[i, : len(question)] = True
        for j, at in enumerate(state_positions):
            sees_memory[i, len(question) + j] = at <= position
        sees_rows[i, : i + 1] = True

    for number, layer in enumerate(copilot.layers, start=1):

        def normed(y: torch.Tensor, norm: Any = layer.input_layernorm) -> torch.Tensor:
            return rms_normalised(y, norm.weight, eps)

        if number % 2 == 1:
            x = x + attention(layer, normed(x), normed(x), sees_rows, theta)
        else:
            x = x + attention(layer, normed(x), normed(memory), sees_memory, None)
        x = x + layer.mlp(rms_normalised(x, layer.post_attention_layernorm.weight, eps))
    x = rms_normalised(x, copilot.stack.norm.weight, eps)
    reached = (x / math.sqrt(x.shape[-1])) @ copilot.output.weight.T
    columns = []
    for token in range(config.vocab_size):  # f is 0 for tokens that W_out has no row for
        places = (copilot.output_ids == token).nonzero()[:, 0].tolist()
        columns.append(reached[:, places[0]] if places else torch.zeros(len(x)))
    return torch.stack(columns, 1)


def rmse(f: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Equation 7: root of the mean over tokens of the squared error summed over V."""
    total = torch.zeros(())
    for row in range(len(f)):
        total = total + ((f[row] - errors[row]) ** 2).sum()
    return torch.sqrt(total / len(f))


def fused_logits(logits: torch.Tensor, f: torch.Tensor, lam: float, space: str) -> torch.Tensor:
    """Equation 8 for one token: log of max(p + lam f, 0) renormalised, or logits + lam f. [V]."""
    if lam == 0:
        return logits
    if space == "logits":
        return logits + lam * f
    mass = torch.clamp(logits.softmax(-1) + lam * f, min=0)
    return torch.log(mass / mass.sum())


@torch.no_grad()
def fused_decoding(
    pilot: Any,
    copilot: Any,
    prompt: list[int],
    *,
    steps: int,
    lam: float,
    space: str,
    feedback: str,
    forced: list[int] | None = None,
    end: int | None = None,
) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy (or `forced`) decoding, all of it recomputed for every token: tokens, and fused logits [V] of each step."""
    tokens: list[int] = []
    fused: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    realised: list[torch.Tensor] = []
    for step in range(steps):
        logits, states = pilot_pass(pilot, prompt + tokens)
        rows = [len(prompt) - 1 + i for i in range(step + 1)]
        history = own if feedback == "own" else realised
        errors = torch.stack(history) if history else torch.zeros(0, logits.shape[1])
        f = copilot_f(copilot, prompt, states, list(range(len(states))), rows, errors)[-1]
        fused.append(fused_logits(logits[-1], f, lam, space))
        tokens.append(forced[step] if forced else int(fused[-1].argmax()))
        own.append(f)
        truth = torch.zeros_like(f)
        truth[tokens[-1]] = 1.0
        realised.append(truth - logits[-1].softmax(-1))
        if tokens[-1] == end:
            break
    return tokens, fused
