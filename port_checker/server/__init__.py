"""The process that serves an ASGI application."""
