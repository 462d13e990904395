"""What Flower loads: the server and the client that edge-bcs has."""

from edge_bcs.fleet.flower import client, server

__all__ = ["client", "server"]
