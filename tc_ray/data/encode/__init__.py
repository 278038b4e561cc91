"""Examples to token ids: chat or plain template, special tokens in user text, bad rows, cuts into parts.

May import: config, data/source, text. Read first: `encode.py` (`Encoder.row`: one record; `encode_files`: all files).
"""
