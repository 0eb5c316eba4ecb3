"""Who may ask, and how the service is run."""
