"""The model: its card, its network, and the graph that the runtimes execute."""
