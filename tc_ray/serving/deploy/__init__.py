"""From run folders and the `serving` section to a running server on Ray Serve.

May import: cluster, config, export, text, and all of serving but failover, which Serve loads by name. Read first: `launch.py`
(`tc-ray serve`); `deployment.py` is the Serve application, also for Serve config files, `replica.py` what runs in a
replica's process.
"""
