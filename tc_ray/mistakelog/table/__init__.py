"""The Delta table under the Mistake Log: files, commits, and who may commit.

Imports `mistakelog.rows`. Read first: `store.py` (a commit, a snapshot); `lease.py` says how a dead run's log is taken over,
`repair.py` what a power cut leaves.
"""
