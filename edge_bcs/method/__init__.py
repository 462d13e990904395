"""edge_bcs/method."""
