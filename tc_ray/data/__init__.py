"""Examples: files are read and checked (`source`), tokenised (`encode`) and kept as a run's data folder (`prepared`).

May import: config, files, text. Read first: `prepared/prepare.py`, which makes train, validation and test.parquet. The
Pilot reads them through `prepared/batches.py`.
"""
