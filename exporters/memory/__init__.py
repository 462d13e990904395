"""Memory: replaying a graph, storing activations otherwise, and choosing what fits a budget."""
