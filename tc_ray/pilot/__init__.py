"""Fine-tuning of the Pilot: Ray Train workers, DeepSpeed, and the record that each round leaves.

May import: config, data, models, mistakelog, cluster, files. Read first: `loop.py` (`Worker.run`). `record.py` makes
a record from a forward pass and gives it to the log's writer (`mistakelog/write`); `checkpoint.py` says which
checkpoint counts.
"""
