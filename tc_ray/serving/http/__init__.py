"""The HTTP application of a replica: OpenAI's routes, keys, limits, streams, metrics. Plain FastAPI, no Ray.

Imports config and serving's engine, models, text, page, headers and errors; neither deploy nor failover.
Read routes.py first: a request enters there, generate.py turns its body into engine requests, responses.py builds the response.
"""
