"""Pilot against fused model on held-out rows: choose lambda on validation rows, measure the test rows once, report.

May import: config, data, models, files. Read first: `procedure.py`; lambda is chosen in `statistics.py` (`choose`).
`run/evaluate.py` launches an evaluation as a Ray task, `export` reads its report.
"""
