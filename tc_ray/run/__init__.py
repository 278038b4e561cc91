"""One run from its recipe to the exported model, the check of its folder, its plan (`plan/`) and a later evaluation.

May import every room but `cli` and `serving`. Read `job.py` first: the list of phases. `train.py` holds the asynchronous part.
Where a stale run is taken over: `folder.py` (run folder: a kernel lock, free when its process has ended) and
`mistakelog/table/lease.py` (`RunLease.take`: the log, from a holder that has stopped renewing). `job.py` takes both.
"""
