"""What keeps a log small and whole: vacuum, retention, compaction, quarantine, verification.

May import: config, mistakelog's rows, table and read. Read first: `maintenance.py`, which decides what is due in a
run.
"""
