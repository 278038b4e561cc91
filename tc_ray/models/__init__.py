"""Pilot, Copilot and their fusion: Hugging Face models and the numerics between them. Knows nothing of Ray."""
