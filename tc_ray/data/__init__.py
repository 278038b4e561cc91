"""Examples: files are read and checked (`source`), tokenised (`encode`) and kept as a run's data folder (`prepared`).

May import config, and the hash of a tokenizer from models. Start with `prepared.prepare`, which makes train, validation and
test.parquet; the Pilot reads them through `prepared.train_table` in the order of `prepared.batches`.
"""
