"""The Ledger: the only process that commits to a run's log.

May import: config, cluster's measure, mistakelog's rows, table and maintain. Read first: `ledger.py`;
`ledger_actor.py` makes it a Ray actor.
"""
