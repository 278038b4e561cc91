"""From the Pilot's step to a data file: a queue and one thread of each worker.

Imports `mistakelog.rows` and `mistakelog.table`. Read first: `writer.py`, where a record is written.
"""
