"""Exported runs in a replica: `registry.py` looks up the model of a request, `loading.py` reads one, `swap.py` replaces it.

May import: config, export, models, text, and serving's engine, text and errors. Read first: `registry.py`.
"""
