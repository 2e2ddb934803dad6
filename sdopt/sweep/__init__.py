"""``sdopt sweep``: tries recipes on targets and sizes; keeps the frontier of what they cost."""
