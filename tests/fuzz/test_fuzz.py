"""Every harness on hostile bytes that hypothesis chooses: the same ones in every run."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.harnesses import HARNESSES, Harness
from tests.fuzz.sandbox import Sandbox, sandbox

pytestmark = pytest.mark.filterwarnings(
    # onnx 1.23 names the keys of external data that it does not know.
    "ignore:Ignoring unknown external data key:UserWarning"
)

EXAMPLES = {"onnx": 60, "bundle": 25, "checkpoint": 50, "adapter": 80, "folder": 100, "text": 60}
"""How many are tried of each harness; each takes some milliseconds."""


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with sandbox() as made:
        yield made


def hostile(one: Harness) -> st.SearchStrategy[bytes]:
    """A valid file, changed once or twice by what knows its structure."""
    return st.builds(
        _changed,
        st.just(one),
        st.sampled_from(one.seeds()),
        st.randoms(use_true_random=False),
        st.sampled_from((1, 1, 1, 2)),
    )


def _changed(one: Harness, data: bytes, random: Random, times: int) -> bytes:
    for _ in range(times):
        data = one.mutate(random, data)
    return data


@pytest.mark.parametrize("name", HARNESSES)
def test_valid_files_pass(name: str, box: Sandbox) -> None:
    for data in HARNESSES[name].seeds():
        HARNESSES[name].run(box, data)


@pytest.mark.parametrize("name", HARNESSES)
def test_hostile_bytes_are_refused_in_words_or_taken(name: str, box: Sandbox) -> None:
    one = HARNESSES[name]

    @settings(
        max_examples=EXAMPLES.get(name, 200),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(hostile(one))
    def run(data: bytes) -> None:
        one.run(box, data)

    run()
