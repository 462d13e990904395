"""The paper's method in torch: a sparse network, its connectivity, attacks, losses, and one training step."""
