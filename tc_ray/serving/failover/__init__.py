"""Streams that outlive the replica which serves them. A plug-in of Ray Serve's proxy process.

May import: config, serving's errors and wire; nothing of serving imports it. Serve loads it by the dotted
name that `deploy/launch.py` puts into the environment. Read first: `proxy.py`; `progress.py` continues a client's
stream on another replica.
"""
