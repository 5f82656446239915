"""The HTTP application over the champion of a registry."""
