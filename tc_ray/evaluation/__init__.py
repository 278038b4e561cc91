"""Models on held-out rows: choose lambda on validation rows, measure each test set once, compare, report. Workers do it.

May import: cluster (resources, measure), config, data, models, files; `answers/` reads final answers. Read first:
`procedure.py`; lambda is chosen in `choose.py` by the rule in `statistics.py` (`choose`). `run/evaluate.py` starts an
evaluation, `export` reads its report.
"""
