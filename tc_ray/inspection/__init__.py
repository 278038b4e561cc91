"""The Mistake Log as a person reads it: statistics, coloured samples, a report page, export. Needs no Ray.

May import config, models and mistakelog. Start with `stats.collect`, which reads a log once; `terminal` and `report` show it.
"""
