"""edge_bcs/core."""
