"""The web page at `/`: static files (HTML, CSS, JavaScript) and the routes that send them.

May import nothing of the package. Read first: `route.py`, then static/app.js.
"""
