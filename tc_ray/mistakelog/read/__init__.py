"""Reading one version of a log, or following a log that grows.

Imports `mistakelog.rows` and `mistakelog.table`. Read first: `reader.py`; `reader_lease.py` says how a version is held.
"""
