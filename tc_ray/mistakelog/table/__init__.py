"""The Delta table under the Mistake Log: files, commits, and who may commit.

May import: config, mistakelog/rows, files, text. Read first: `store.py` (a commit, a snapshot); `data_file.py` writes
a file, `lease.py` takes over a dead run's log, `repair.py` mends what a power cut leaves.
"""
