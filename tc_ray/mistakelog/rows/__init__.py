"""What a row of the Mistake Log is, in Arrow and in memory.

Imports nothing of the package but `config`. Read first: `schema.py` (columns, metadata), then `records.py` (rows in memory).
"""
