"""The Pilot: load it, run its training forward, tap its hidden states, list its token errors (paper sections 2.2, 3.1).

May import config and the modules beside it in `models`. Read `step` first: what one micro-batch leaves for the mistake log.
"""
