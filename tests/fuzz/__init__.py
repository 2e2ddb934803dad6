"""Hostile bytes through every entry point; see ``harnesses`` for what must hold of each."""
