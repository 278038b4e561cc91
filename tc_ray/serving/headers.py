"""Names of the HTTP headers that replicas and the failover proxy exchange. Read by http/ and failover/.

Invariant: the failover proxy removes RESUME and SEED from what clients send, so a replica that is reached through it can
trust them.
"""

RESUME_HEADER = "X-TC-Ray-Resume"
"""Request: id and time of the stream that this request repeats."""
SEED_HEADER = "X-TC-Ray-Seed"
"""Request and response: seed of the sampling."""
COPILOT_HEADER = "X-TC-Ray-Copilot"
"""Response: version of the Copilot that made it."""
FAILOVER_HEADER = "X-TC-Ray-Failover"
"""Response: it went through the failover proxy. `deploy/launch.py` warns where it is missing."""
