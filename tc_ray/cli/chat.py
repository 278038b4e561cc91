"""`tc-ray chat`: talk to a run's Pilot and fused model in the terminal. Needs no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that has ended, or an exported model.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most new tokens of an answer.")] = 256,
) -> None:
    """Talk to Pilot and fused model, beside each other; /lam 0.5 sets lambda, /clear, /help, /quit."""
    from tc_ray.serving.chat.conversation import open_conversation
    from tc_ray.serving.chat.terminal import run_chat

    with open_conversation(run, max_tokens) as conversation:
        run_chat(conversation)
