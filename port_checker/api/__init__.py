"""Who may ask, and what we answer: an ASGI application."""
