"""From records in memory to data files on the disk, in a thread of each Pilot worker.

May import `mistakelog.rows`, `mistakelog.table` and config. Read `writer.py` first: `RecordWriter.put` is where a record is written; it
waits in `queue.py` and is written by `open_file.py`. The finished file is committed by the Ledger (`mistakelog/commit`).
"""
