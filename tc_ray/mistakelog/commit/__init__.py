"""The one committer of a run's log.

Imports `mistakelog.rows`, `table` and `maintain`. Read first: `ledger.py`; `ledger_actor.py` makes it a Ray actor.
"""
