"""What a row of the Mistake Log is, in Arrow and in memory.

May import nothing of the package. Read first: `schema.py` (columns, metadata), then `records.py` (rows in memory).
"""
