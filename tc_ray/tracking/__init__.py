"""Tracking of a run: metrics.jsonl, status.json, MLflow, the loss plot and the progress view.

May import `config`, `files` and `text` only. Read `tracker.py` first: `Tracker._record` is where every measurement enters.
`start_tracker` is what the job calls; all readers read the run folder.
"""
