"""Models: exported runs in a replica. registry.py looks up the model of a request, loading.py reads one, swap.py replaces it.

It may import engine/, text/ and the models outside serving. Read registry.py first.
"""
