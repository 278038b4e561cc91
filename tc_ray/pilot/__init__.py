"""Fine-tuning of the Pilot: Ray Train workers, DeepSpeed, and the record that each round leaves.

May import config, data, models, mistakelog and cluster. Read `loop.py` first (`Worker.run`); `record.py` is where a record is made from
a forward pass and given to the log's writer (`mistakelog/write`), `checkpoint.py` says which checkpoint counts.
"""
