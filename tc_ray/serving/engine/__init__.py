"""Continuous batching of one fused model in a thread, behind a small interface (`contract.py`).

May import: config, models, serving's text and errors; nothing of HTTP or Ray. Read first: `engine.py`. A request
enters the batch in `worker.py` (`Worker._join`); `models/decoding/batch.py` computes one token of each sequence.
"""
