"""Exported runs in a replica, loaded and by name (`registry.py`). May import: config, export, models, text, and serving's engine,
text and errors."""
