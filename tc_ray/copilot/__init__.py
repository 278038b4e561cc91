"""Asynchronous training of the Copilot from the Mistake Log while it grows, or from a stored log (`tc-ray train-copilot`).

May import: config, data, models, mistakelog, cluster, files; never pilot. Read first: `training.py` (`train`), the loop
of both: a feed fills `buffer.py`, `batch.py` makes a batch of a draw, `learner.py` steps. `worker.py` feeds it from the
growing log, `from_log.py` from a stored one. `group.py` starts and restarts the workers.
"""
