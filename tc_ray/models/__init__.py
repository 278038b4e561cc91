"""Pilot, Copilot and their fusion: Hugging Face models and the numerics between them. No Ray, no mistake log.

May import config, files and text. pilot <- copilot <- fusion; losses, families, weights, finite, hub, builtin,
identity and folder below. Read `pilot/step`, `copilot/model`, `fusion/core`, in this order.
"""
