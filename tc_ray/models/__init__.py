"""Pilot, Copilot and their fusion: Hugging Face models and the numerics between them. No Ray, no Mistake Log.

May import: config, files, text. fusion may import copilot and pilot, copilot may import pilot; the modules of this
folder import none of the three. Read first: `pilot/step.py`, then `copilot/model.py`, then `fusion/core.py`.
"""
