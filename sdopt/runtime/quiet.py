"""Loading through transformers and diffusers without what they print on the terminal."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence remarks and progress bars inside, and put their settings back.

    transformers 5 says when imported that image processors would like torchvision, which nothing
    here needs; both libraries draw a bar for every model they load.

    Raises:
        ImportError: transformers is not installed.
    """
    # By name: as attributes of lazy modules these have no types.
    transformers = importlib.import_module("transformers.utils.logging")
    level, bars = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    transformers.disable_progress_bar()
    try:
        yield
    finally:
        transformers.set_verbosity(level)
        if bars:
            transformers.enable_progress_bar()
