"""Deploy: from run folders and the `serving` section to a running server on Ray Serve.

It may import everything in serving but failover/, which Serve loads by name. Read launch.py first (`tc-ray serve`);
deployment.py is the Serve application, also for Serve config files, and replica.py what runs in a replica's process.
"""
