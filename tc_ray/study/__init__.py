"""A study: variants x tasks x seeds of one recipe, what they share trained once, and one report with the controls.

May import: everything below `cli` but export and serving. Read first: `file.py` (STUDY.yaml), then `cells.py`, which makes
cells of it; `work.py` is what a cell does, `schedule.py` runs the cells, `report.py` shows the results.
"""
