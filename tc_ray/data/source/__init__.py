"""Data files: which are read for which part, their records, and the record shapes that become an `Example`.

May import config. Start with `find` (which files) and `records` (what is in them); `errors.DataError` is the one error.
"""
