"""Asynchronous training of the Copilot from the Mistake Log while it grows, or from a stored log (`tc-ray train-copilot`).

May import: config, data, models, mistakelog, cluster, files; never pilot. Read first: `worker.py`
(`CopilotWorker.run`): it follows the log into `buffer.py`, makes a batch (`batch.py`) and takes a step in
`learner.py`. `group.py` starts and restarts the workers.
"""
