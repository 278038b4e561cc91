"""A run's data folder: made at each start, checked, hashed, and read in batches by round.

May import: config, data/source, data/encode, files. Read first: `prepare.py`; `batches.py` (`RoundOrder`)
says which rows a round trains on.
"""
