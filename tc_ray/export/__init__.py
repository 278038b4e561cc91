"""The folder of an exported run: find and check one (`check.py`), write a run's (`write.py`), join two models (`join.py`).

May import: config, models, evaluation (the report's numbers), files, text. Read first: `check.py`. `write.py` is the
last phase of a run, `join.py` the work of `tc-ray fuse`. The format of fusion.json is in `models/folder.py`.
"""
