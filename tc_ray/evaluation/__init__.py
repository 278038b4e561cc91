"""Pilot against fused model on held-out rows: choose lambda on validation rows, measure the test rows once, report.

May import config, data (prepared rows), models, files; `run.evaluate` launches it as a Ray task and `export` reads its report.
Read `procedure` first, then `selection` (where lambda is chosen), `metric` and `ranking`, and `report`.
"""
