"""The engine: continuous batching of one fused model in a thread, behind a small interface (contract.py).

Imports config, models, serving/text and errors; nothing of HTTP or Ray.
Read engine.py first; a request enters the batch in worker.py (`Worker._join`), one token is computed in batch.py.
"""
