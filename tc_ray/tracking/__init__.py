"""Tracking of a run: metrics.jsonl, status.json, MLflow, the picture of losses and the progress lines.

May import: config, files, text. Read first: `tracker.py` (`Tracker._record` is where every measurement enters).
Commands that show a run read its folder, not the Tracker.
"""
