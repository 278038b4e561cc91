"""The HTTP API: request and answer shapes, routes, streams, limits and metrics. Stands on the engine; put together by app.py."""
