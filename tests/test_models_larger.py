"""The same as tests/test_models.py for the models after 1.x, so that both can run at once."""

from __future__ import annotations

import pytest

from tests import models
from tests.exporters.made import copy_of


@pytest.mark.parametrize("name", [name for name in models.MODELS if not name.startswith("sd1")])
def test_a_model_gives_what_the_page_says(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("tensorrt_rtx")
    models.check(name, copy_of(name, tmp_path_factory)[1])
