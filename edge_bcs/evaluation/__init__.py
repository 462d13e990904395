"""edge_bcs/evaluation."""
