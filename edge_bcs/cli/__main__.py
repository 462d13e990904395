"""`python -m edge_bcs.cli`."""

from __future__ import annotations

from edge_bcs.__main__ import main

main()
