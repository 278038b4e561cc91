"""The final answer in a text, and whether it is the gold one: numbers, choices, letters, truth values, plain text.

Imports nothing of the package. Read first: `scoring.py` (`matches`), then `numbers.py`.
"""
