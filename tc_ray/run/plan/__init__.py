"""What a run would do and need, computed before anything is started: `tc-ray train --plan`.

May import what run may, but not `run/job.py`. Read first: `plan.py`; `model_sizes.py` counts parameters,
`data_estimate.py` rows.
"""
