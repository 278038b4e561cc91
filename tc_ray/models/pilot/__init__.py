"""The Pilot: load it, run its training forward, tap its hidden states, list its token errors (paper sections 2.2, 3.1).

May import: config and the single-file modules of models. Read first: `step.py`, what one micro-batch leaves for the
Mistake Log.
"""
