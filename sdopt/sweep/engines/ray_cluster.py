"""The nodes of a Ray cluster: which may be taken, what has room, where times are taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt.errors import UsageError
from sdopt.sweep import provenance
from sdopt.sweep.engines.ray_node import Facts, facts
from sdopt.sweep.records import Task

_ANSWER = 120.0
"""Seconds that a node has to say what it is: it imports sdopt for that."""


@dataclass(frozen=True)
class Node:
    """A node that may be taken.

    Attributes:
        name: Ray's id of it.
        address: for people.
        cpus: that it has for Ray.
        gpus: likewise.
        facts: what it said of itself.
    """

    name: str
    address: str
    cpus: int
    gpus: int
    facts: Facts

    @property
    def machine(self) -> str:
        """See ``Facts``."""
        return self.facts.machine


@dataclass(frozen=True)
class Taken:
    """Room for a task: Ray's options for it, and the node where it must be that one."""

    options: Mapping[str, Any]
    node: Node | None = None


class Cluster:
    """The living nodes.

    Raises:
        UsageError: one has other versions, and those are not taken.
    """

    def __init__(self, ray: Any, other_versions: bool) -> None:
        self._ray, self._other_versions = ray, other_versions
        self._known: dict[str, Node] = {}
        self._kinds: dict[bool, str] = {}
        self.nodes: tuple[Node, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        """See which nodes there are now.

        Raises:
            UsageError: a new one cannot be taken.
        """
        alive = {one["NodeID"]: one for one in self._ray.nodes() if one["Alive"]}
        new = [name for name in alive if name not in self._known]
        asked = [self._on(name, facts) for name in new]
        for name, answer in zip(new, asked, strict=True):
            if (node := self._meet(alive[name], answer)) is not None:
                self._known[name] = node
        self.nodes = tuple(self._known[name] for name in alive if name in self._known)

    def node(self, name: str) -> Node:
        """A node by Ray's id, one that has come since, too.

        Raises:
            UsageError: it cannot be taken.
        """
        if name not in self._known:
            self.refresh()
        return self._known[name]

    def check(self, tasks: Sequence[Task]) -> None:
        """See that the cluster has what tasks need.

        Raises:
            UsageError: it has not.
        """
        cards = [task for task in tasks if _on_card(task)]
        for task in cards:
            if task.device != "cuda:0":
                raise UsageError(
                    f"{task.label or task.kind} asks for the card {task.device}",
                    why="on a cluster Ray chooses the card, and a task sees no other",
                    hint="leave the target's device out",
                )
        if cards and not any(node.gpus for node in self.nodes):
            raise UsageError(
                f"no node of the cluster has a GPU for {cards[0].label or cards[0].device}",
                where=", ".join(node.address for node in self.nodes),
                hint="start Ray there with --num-gpus N, or leave that target out",
            )
        if not any(node.cpus for node in self.nodes):
            raise UsageError(
                "no node of the cluster has a CPU for tasks",
                hint="start Ray with --num-cpus N on at least one of them",
            )

    def room(self, task: Task, running: Sequence[tuple[Task, Node | None]]) -> Taken | None:
        """Where a task may run now, beside those that run; None if nowhere.

        Tasks that are not timed go wherever Ray puts them. Times are taken on one kind of
        machine, by one task per device.
        """
        card = _on_card(task)
        if task.kind == "time":
            same = [(one, node) for one, node in running if _on_card(one) is card]
            return self._to_time(card, [node for one, node in same if node and _times(one)])
        total = sum(node.gpus if card else node.cpus for node in self.nodes)
        if sum(_on_card(one) is card for one, _ in running) >= total:
            return None
        return Taken({"num_cpus": 1, "num_gpus": int(card)})

    def depot(self, cls: type, root: Path) -> Any:
        """An actor beside the driver, which serves its files."""
        here = self._ray.get_runtime_context().get_node_id()
        return (
            self._ray.remote(cls)
            .options(
                num_cpus=0,
                max_concurrency=8,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=self._pinned(here),
            )
            .remote(root)
        )

    def everywhere(self, what: Callable[..., object], *args: object) -> list[Any]:
        """Call a function on every node; gives Ray's references."""
        return [self._on(node.name, what, *args) for node in self.nodes]

    def _to_time(self, card: bool, timing: Sequence[Node]) -> Taken | None:
        fit = [node for node in self.nodes if (node.gpus if card else node.cpus)]
        kinds = Counter(node.facts.kind for node in fit)
        if self._kinds.get(card) not in kinds:
            self._kinds[card] = max(sorted(kinds), key=lambda kind: kinds[kind], default="")
        for node in fit:
            if node.facts.kind != self._kinds[card]:
                continue
            if card and timing.count(node) < node.gpus:
                return Taken(self._there(node, num_cpus=1, num_gpus=1), node)
            if not card and all(other.machine != node.machine for other in timing):
                return Taken(self._there(node, num_cpus=node.cpus), node)
        return None

    def _there(self, node: Node, **resources: int) -> dict[str, Any]:
        return {**resources, "scheduling_strategy": self._pinned(node.name)}

    def _pinned(self, name: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(name, soft=False)

    def _on(self, name: str, what: Callable[..., object], *args: object) -> Any:
        remote = self._ray.remote(what)
        strategy = self._pinned(name)
        return remote.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(
            *args
        )

    def _meet(self, data: Mapping[str, Any], answer: Any) -> Node | None:
        """A node that has said what it is; None if it went away meanwhile.

        Raises:
            UsageError: it cannot be taken.
        """
        errors = self._ray.exceptions
        address, resources = str(data["NodeManagerAddress"]), data["Resources"]
        try:
            found: Facts = self._ray.get(answer, timeout=_ANSWER)
        except errors.RayTaskError as error:
            raise UsageError(
                "a node of the cluster cannot run sdopt",
                where=address,
                why=str(error.cause or error).strip().partition("\n")[0],
                hint='install there what is installed here: pip install "sdopt[ray]"',
            ) from error
        except errors.GetTimeoutError as error:
            raise UsageError(
                "a node of the cluster does not answer",
                where=address,
                why=f"nothing within {_ANSWER:.0f} s",
                hint="see its logs, or take it out: ray stop",
            ) from error
        except errors.RayError:
            return None
        others = list(_differences(found.versions))
        if others and not self._other_versions:
            raise UsageError(
                "a node of the cluster has other versions",
                where=address,
                why="; ".join(others),
                hint="install the same there, or take it as it is: --allow-other-versions",
            )
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        return Node(str(data["NodeID"]), address, cpus, gpus, found)


def _differences(theirs: Mapping[str, str]) -> list[str]:
    ours = provenance.versions()
    return [
        f"{name} {theirs.get(name, 'is missing')}, here {ours.get(name, 'it is missing')}"
        for name in dict.fromkeys([*ours, *theirs])
        if theirs.get(name) != ours.get(name)
    ]


def _on_card(task: Task) -> bool:
    return task.device.partition(":")[0] == "cuda"


def _times(task: Task) -> bool:
    return task.kind == "time"
