"""The web page of the server: static files and the router that sends them. Used by the app."""
