"""Ray around a run: the session, whether the cluster can hold it, which failures a restart cures, signals.

May import `config` and `text` only. Read `session.py` first. The asynchronous parts themselves are in `run/`, `pilot/` and
`copilot/`.
"""
