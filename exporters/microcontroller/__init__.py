"""A C project for a microcontroller: an artifact as arrays, and the runner's sources."""
