"""One run from its recipe to the exported model, its plan (`plan/`), and a later evaluation (`evaluate.py`).

May import every folder but cli and serving. Read first: `job.py`, the list of phases; `prepare.py`, `train.py` (the
asynchronous part) and `evaluate.py` do their work. A stale run is taken over by `RunLease.take` in
`mistakelog/table/lease.py`, which `job.py` calls: at once if its process on this machine is dead, after 60 s of
silence if it is elsewhere.
"""
