"""The board itself: the process, its heat, and how much is written to its medium."""
