"""A chat in the terminal with the Pilot and the fused model of one run, in this process and without Ray.

May import: config, serving's engine, models and text, and `deploy.settings`, which finds an export. Read first:
`conversation.py` (what is asked and kept); `terminal.py` reads lines, knows the commands and shows both answers.
"""
