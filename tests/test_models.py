"""docs/models.md is what the models give today."""

from __future__ import annotations

import pytest

from tests import models
from tests.exporters.made import copy_of


@pytest.mark.parametrize("name", [name for name in models.MODELS if name.startswith("sd1")])
def test_a_model_gives_what_the_page_says(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("tensorrt_rtx")
    models.check(name, copy_of(name, tmp_path_factory)[1])


def test_the_page_is_that_of_the_record() -> None:
    known = models.recorded()
    assert list(known) == list(models.MODELS)
    assert models.PAGE.read_text("utf-8") == models.page(known)


def test_every_family_is_among_them() -> None:
    from sdopt.exporters.components import FAMILIES

    titles = " ".join(title for title, _ in models.MODELS.values())
    assert all(family.title.split(" ")[0] in titles for family in FAMILIES.values())
    components = {part for one in models.recorded().values() for part in one.components}
    assert components == {part.name for family in FAMILIES.values() for part in family.components}
