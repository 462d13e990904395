"""`python -m edge_bcs.cli`."""

from __future__ import annotations

from edge_bcs.cli import main

main(prog_name="edge-bcs")
