"""The Mistake Log: a Delta table of what the Pilot got wrong, written while it trains, read by the Copilot.

Folders, each importing only those before it: rows (a row), table (the table), write (Pilot's side), read (Copilot's side), maintain
(merge, retire, vacuum, verify), commit (the Ledger). Outside of the package it imports `config`, `files` and `text`. Read first:
`rows/schema.py`. A record is written in `write/writer.py`; a dead run's lease is taken over in `table/lease.py`.
"""
