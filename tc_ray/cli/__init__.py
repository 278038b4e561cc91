"""The command line: commands, each a thin call into the package.

May import everything, but a command's own imports happen when it runs, so that `tc-ray --help` loads neither torch
nor ray. Read first: `main.py`, which joins the commands. `command.py` holds what they share: printing, and exit codes
with one message.
"""
