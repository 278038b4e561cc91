"""Asynchronous training of the Copilot from the Mistake Log while it grows, or from a stored log (`tc-ray train-copilot`).

May import config, data, models, mistakelog and cluster; never `pilot`. Read `worker.py` first (`CopilotWorker.run`): it follows the log
into `buffer.py`, makes a batch (`batch.py`) and lets `learner.py` take a step. `group.py` starts and restarts the workers.
"""
