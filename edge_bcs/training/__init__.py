"""edge_bcs/training."""
