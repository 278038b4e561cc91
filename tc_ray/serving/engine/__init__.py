"""The engine: continuous batching of one fused model in a thread, behind a small interface (contract.py).

Imports config, models, serving/text and errors; nothing of HTTP or Ray.
Read engine.py first; a request enters the batch in worker.py (`Worker._join`), one token is computed in batch.py.
"""

from tc_ray.serving.engine.contract import (
    Event,
    Explained,
    Failed,
    Finished,
    GenerationRequest,
    Load,
    Piece,
    Request,
    RequestHandle,
    Scored,
    ScoredToken,
    ScoreRequest,
    Token,
)
from tc_ray.serving.engine.engine import Engine, Reservation
from tc_ray.serving.engine.turns import Turns

__all__ = [
    "Engine",
    "Event",
    "Explained",
    "Failed",
    "Finished",
    "GenerationRequest",
    "Load",
    "Piece",
    "Request",
    "RequestHandle",
    "Reservation",
    "ScoreRequest",
    "Scored",
    "ScoredToken",
    "Token",
    "Turns",
]
