"""Ray around a run: the session, whether the cluster can hold it, which failures a restart cures, signals; `measure.py`: what
a process has used.

May import: config, text. Read first: `session.py`. The asynchronous parts themselves are in `run/`, `pilot/` and
`copilot/`.
"""
