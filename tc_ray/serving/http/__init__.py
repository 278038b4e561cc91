"""The HTTP application of a replica: OpenAI's routes, keys, limits, streams, metrics. Plain FastAPI, no Ray.

May import: config, and serving's engine, models, text, page, wire and errors. Read first: `routes.py`, where a request that
has passed `gate.py` arrives; `generate.py` turns its body into engine requests, `responses.py` builds the response.
"""
