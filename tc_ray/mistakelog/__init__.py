"""The Mistake Log: a Delta table of what the Pilot got wrong, written while it trains, read by the Copilot.

Folders, each importing only those before it: rows (a row), table (the table), write (Pilot's side), read (Copilot's
side), maintain (merge, retire, vacuum, verify), commit (the Ledger). May import besides: config, files, text. Read
first: `rows/schema.py`. A record is queued in `write/writer.py` and reaches the disk in `table/data_file.py`; a dead
run's lease is taken over in `table/lease.py`.
"""
