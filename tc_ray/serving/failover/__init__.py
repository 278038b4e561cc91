"""Failover: streams that outlive the replica which serves them. A plug-in of Ray Serve's proxy process.

It may import serving's errors, headers and latency; nothing of serving imports it. Serve loads it by the dotted name
that `deploy/launch.py` puts into the environment. Read proxy.py first; progress.py joins a stream and its repeat.
"""
