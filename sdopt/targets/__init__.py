"""What runs a graph: one module per target, each with its dialect and the lowering it wants."""
