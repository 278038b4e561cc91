"""Text and token ids: prompts encoded, generated tokens decoded piece by piece, single tokens shown.

May import: data/encode and serving's errors. Read first: `prompt.py`; `incremental.py` decodes a generation and finds
its stop strings.
"""
