"""Examples to token ids: chat or plain template, special tokens in user text, bad rows, cuts into parts.

May import config and source. Start with `encode.Encoder.row` (one record) and `encode_files` (all files, in Ray tasks).
"""
