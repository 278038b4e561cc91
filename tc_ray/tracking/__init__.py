"""Tracking of a run: metrics.jsonl, status.json, MLflow and other trackers, the picture of losses, the progress lines.

May import: config, cluster's measure, files, text. Read first: `tracker.py` (`Tracker._record` is where every measurement enters).
Commands that show a run read its folder, not the Tracker.
"""
