"""Low-rank adapters: reading their files, finding their weights, adding them up."""

MERGED_KEY = "sdopt.lora"
"""Metadata key of a model: JSON, digest of each adapter file merged into it to its scale."""
