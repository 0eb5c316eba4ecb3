"""The provider's side."""
