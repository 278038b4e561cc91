"""Data files: which are read for which part, their records, and the record shapes that become an `Example`.

May import: config, files, text. Read first: `find.py` (which files), then `records.py` (what is in them).
`records.DataError` is the one error.
"""
