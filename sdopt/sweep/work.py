"""What the tasks of a sweep do, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdopt.sweep.place import Place
from sdopt.sweep.tasks import Task


@dataclass(frozen=True)
class Found:
    """What a task found.

    Attributes:
        data: plain data.
        files: that it made, relative to the place's root, data files before graphs.
        waited: seconds that it waited for a lock.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    waited: float = 0.0


def do(task: Task, place: Place) -> Found:
    """Do a task.

    Raises:
        SdoptError: it cannot be done, in the words of whatever refused.
    """
    raise NotImplementedError
