"""A running batch of sequences, each decoded as if alone: what the serving engine and the evaluation share.

May import: the rest of models. Read first: `batch.py` (one token of every sequence), then `prefill.py` (a prompt) and
`kv_rows.py` (keys and values of rows that come and go).
"""
