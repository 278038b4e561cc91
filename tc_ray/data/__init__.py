"""Examples: files are read and checked (`source`), tokenised (`encode`) and kept as a run's data folder (`prepared`).

May import: config, models (the hash of a tokenizer), files, text. Read first: `prepared/prepare.py`, which makes
train, validation and test.parquet. The Pilot reads them through `prepared/train_table.py` in the order of
`prepared/batches.py`.
"""
