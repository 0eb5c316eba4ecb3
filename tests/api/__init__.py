"""The server: who may ask, and how it is run."""
