"""exporters/memory."""
