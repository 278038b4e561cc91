"""A run's data folder: made once, checked, hashed, and read in batches by round.

May import config, source and encode. Start with `prepare.prepare`; `batches.RoundOrder` says which rows a round trains on.
"""
