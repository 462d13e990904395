"""runtime/board."""
