"""Asynchronous training of the Copilot from the Mistake Log while it grows."""
