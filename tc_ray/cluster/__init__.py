"""Ray around a run: the session, whether the cluster can hold it, which failures a restart cures, signals.

May import: config, text. Read first: `session.py`. The asynchronous parts themselves are in `run/`, `pilot/` and
`copilot/`.
"""
