"""Text and token ids: prompts encoded, generated tokens decoded piece by piece, single tokens shown.

Imports data/encode and errors; knows nothing of models, threads or HTTP.
Read prompt.py first; incremental.py decodes a generation and finds its stop strings.
"""
