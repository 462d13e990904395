"""exporters/frontends."""
