"""From a network as users have it to the layer graph."""
