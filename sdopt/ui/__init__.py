"""The page of ``sdopt ui``: it calls ``sdopt.api`` and shows its reports."""
