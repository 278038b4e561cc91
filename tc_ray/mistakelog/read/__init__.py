"""Reading one version of a log, or following a log that grows.

May import: mistakelog's rows and table. Read first: `reader.py`; `reader_lease.py` says how a version is held.
"""
