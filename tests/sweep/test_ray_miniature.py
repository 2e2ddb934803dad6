"""The 24 points of the miniature model on two nodes, one of which is lost in the middle."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdopt.bundle import Bundle
from sdopt.sweep.asking import Asked
from sdopt.sweep.engines.ray import RayEngine
from sdopt.sweep.place import Place
from sdopt.sweep.result import Result
from sdopt.sweep.sweeping import run
from tests.sweep import miniature
from tests.sweep.cluster import connected, kill, two_nodes, workers_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KILLED_AFTER = 20
"""Outcomes of 60 that are recorded when a node is lost: points are scored then."""


class Lost(threading.Thread):
    """Kills a node and all its processes while it is at work in the middle of a sweep."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        super().__init__(daemon=True)
        self._cluster, self._folder = cluster, folder
        self.rows: dict[str, list[Any]] = {}

    def run(self) -> None:
        node = next(iter(self._cluster.worker_nodes))
        while len(miniature.rows(self._folder)) < KILLED_AFTER or not _at_work(node):
            time.sleep(0.05)
        self.rows = miniature.rows(self._folder)
        kill(self._cluster, node)


def _at_work(node: Any) -> bool:
    """Whether a process of the node does a task of the sweep: Ray names it by the task's label."""
    titles = []
    for one in workers_of(node):
        with suppress(psutil.NoSuchProcess):
            titles += one.cmdline()[:1]
    return any(title.startswith("ray::clean") for title in titles)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, list[Any]]]:
    """The result on the cluster, and the rows that were recorded when the node was lost."""
    bundle, folder = miniature.bundle(tmp_path_factory), tmp_path_factory.mktemp("ray") / "s"
    asked = Asked(**miniature.POINTS)
    with two_nodes() as cluster, connected(cluster):
        lost = Lost(cluster, folder)

        def engine(place: Place) -> RayEngine:
            # Both nodes see the driver's files: here they are to fetch them all the same.
            return RayEngine(place, place.raw_files(), cluster.address, look=False)

        lost.start()
        opened = Bundle.open(bundle)
        found = run(bundle, folder, asked.space(opened), asked.settings(), engine=engine)
        lost.join()
    return found, lost.rows


def test_the_points_are_those_of_two_processes_each_once(
    swept: tuple[Result, dict[str, list[Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    found, _ = swept
    other, _ = miniature.swept(tmp_path_factory)
    assert len(found.points) == 24
    assert {one.state for one in found.points} == {"done"}
    assert all(one.ms is not None for one in found.points)
    assert miniature.points(found) == miniature.points(other)
    assert [one.key for one in found.points] == [one.key for one in other.points]
    assert set(miniature.rows(found.folder)) == set(miniature.rows(other.folder))


def test_only_what_the_lost_node_was_at_was_begun_again(
    swept: tuple[Result, dict[str, list[Any]]],
) -> None:
    found, before = swept
    after = miniature.rows(found.folder)
    assert KILLED_AFTER <= len(before) < len(after) == 6 + 6 + 24 + 24
    assert {key: after[key] for key in before} == before
    again = [key for key, (_, _, _, attempts, _) in after.items() if attempts > 1]
    assert len(again) == 1, "the node had room for one task"
    assert again[0] not in before
