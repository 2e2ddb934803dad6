"""A plug-in of sdopt: the pass ``swap_gelu``."""
