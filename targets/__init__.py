"""Boards, and the simulator of their memory budget."""
