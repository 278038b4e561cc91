"""The web page at `/`: static files (HTML, CSS, JavaScript) and the routes that send them.

Imports nothing of the package. Read route.py first, then static/app.js.
"""
