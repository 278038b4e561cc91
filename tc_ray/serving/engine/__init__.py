"""The engine: continuous batching of a fused model behind a small contract. See `engine.Engine`."""

from tc_ray.serving.engine.contract import (
    Event,
    Explained,
    Failed,
    Finished,
    GenerationRequest,
    Load,
    Piece,
    Request,
    Scored,
    ScoredToken,
    ScoreRequest,
    Ticket,
    Token,
)
from tc_ray.serving.engine.engine import Engine
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
    "ScoreRequest",
    "Scored",
    "ScoredToken",
    "Ticket",
    "Token",
    "Turns",
]
