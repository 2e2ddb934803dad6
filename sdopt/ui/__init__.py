"""``sdopt ui``: a page in the browser over the verbs, for one folder of models and bundles."""

from __future__ import annotations

from sdopt.ui.app import App, Settings
from sdopt.ui.serving import serve

__all__ = ["App", "Settings", "serve"]
