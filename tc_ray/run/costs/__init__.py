"""What a run took: time by part, memory, speed and capacity of both sides, bytes of the log. `tc-ray report`; needs no Ray.

May import config, inspection, mistakelog, tracking. Read first: `measured.py` (what the files of a run say); `tables.py`
and `page.py` show it.
"""
