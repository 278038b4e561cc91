"""The Mistake Log as a person reads it: statistics, coloured samples, a report page, export. Needs no Ray.

May import: config, models, mistakelog, files, text. Read first: `stats.py` (`collect` reads a log once);
`terminal.py` and `report.py` show it.
"""
