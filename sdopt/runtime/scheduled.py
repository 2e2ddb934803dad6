"""A stage with companions as one session of its original inputs: what runs when, what is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from sdopt import modelfile
from sdopt.companions import PLAN_KEY, Entry, Plan, Schedule
from sdopt.errors import BundleError, UsageError
from sdopt.session import Port, Session, checked_feeds

KEPT = {"prompt": 4, "step": 1024}
"""How many results of a companion are kept: as many prompts, as many values of the timestep."""

Key = tuple[object, ...]


Replaced = Mapping[str, Mapping[str, ir.TensorProtocol]]
"""Of each companion, and of the main graph under ``""``: initializer to the tensor to load."""


class Opener(Protocol):
    """The part of a target that opens files."""

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """Open an ONNX file."""


@runtime_checkable
class Adapting(Opener, Protocol):
    """A target that can also open files with other weights than theirs."""

    def open_adapted(
        self, path: Path, weights: Mapping[str, ir.TensorProtocol], *, optimize: bool = True
    ) -> Session:
        """Open an ONNX file with some of its initializers replaced."""


def open_stage(
    target: Opener, path: Path, *, optimize: bool = True, replaced: Replaced | None = None
) -> Session:
    """Open a stage: its graph, or its graph with companions behind the original inputs.

    Args:
        target: what opens the files.
        path: the stage's file.
        optimize: whether the target's runtime may rewrite the graphs.
        replaced: initializers that are loaded in place of those in the files.

    Raises:
        UsageError: the target cannot replace initializers.
        BundleError: no such file, or a companion is missing.
        BuildError, MissingDependencyError: the target cannot open one of them.
    """
    text = modelfile.metadata(path).get(PLAN_KEY)

    def opened(file: Path, name: str) -> Session:
        if not (replaced and name in replaced):
            return target.open(file, optimize=optimize)
        if not isinstance(target, Adapting):
            raise UsageError(
                f"the target {target} cannot change weights", hint="leave out the adapters"
            )
        return target.open_adapted(file, replaced[name], optimize=optimize)

    main = opened(path, "")
    if text is None:
        return main
    plan = Plan.loads(text, str(path))
    beside = {one.name: opened(path.with_name(one.file), one.name) for one in plan.graphs}
    return Scheduled(plan, main, beside, str(path))


@runtime_checkable
class Holding(Protocol):
    """A session on a device that takes what others left there, and leaves values there itself."""

    def holds(self) -> bool:
        """Whether that can be done here."""

    def run_held(
        self, feeds: Mapping[str, Any], held: Collection[str], *, keep: bool
    ) -> dict[str, Any]:
        """Compute; ``held`` outputs stay on the device, to be kept or until the next run."""


class Scheduled:
    """Main graph and companions as one graph of the original inputs and outputs.

    A companion that runs before the main graph runs again only when what it takes has changed:
    its results are kept by the bytes they came from. One that runs in place of the main graph is
    fed what that gave at its last run, and follows the number of the step: a run begins with the
    main graph, and so does whatever does not look like the next step of the run (a timestep that
    is not below the last one, another prompt, another size). Schedulers that visit a timestep
    twice in a row (PNDM, Heun) count both visits. What one graph gives another does not leave a
    card that all of them are on.
    """

    def __init__(
        self, plan: Plan, main: Session, beside: Mapping[str, Session], where: str
    ) -> None:
        self._plan = plan
        self._main = main
        self._beside = beside
        self._where = where
        self._before = [one for one in plan.graphs if not Schedule(one.schedule).in_place]
        self._instead = [one for one in plan.graphs if Schedule(one.schedule).in_place]
        self._kept: dict[str, OrderedDict[Key, dict[str, Any]]] = {
            one.name: OrderedDict() for one in self._before
        }
        self._keyed = {*plan.same, *(name for one in self._before for name in one.takes)}
        self._run = _Run()
        sessions = (main, *beside.values())
        self._holding = all(isinstance(one, Holding) and one.holds() for one in sessions)
        ports = self._ports()
        self.inputs: Mapping[str, Port] = {name: ports[name] for name in plan.inputs}
        self.outputs: Mapping[str, Port] = {name: main.outputs[name] for name in plan.outputs}
        self.calls = dict.fromkeys(["main", *beside], 0)
        """How often each graph was computed so far, for tests and measurements."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs; companions are computed or not, as their schedules say.

        Raises:
            UsageError: feeds that are not the function's inputs.
            BuildError: the target's runtime failed in a graph.
        """
        values = checked_feeds(self.inputs, feeds, self._where)
        keys: dict[str, object] = {
            name: _key(array) for name, array in values.items() if name in self._keyed
        }
        for name, (source, axis) in self._plan.sizes.items():
            values[name] = np.array([values[source].shape[axis]], np.int64)
            keys[name] = int(values[name][0])
        for one in self._before:
            key = tuple(keys[name] for name in one.takes)
            values |= self._result(one, key, values)
            keys |= {name: (one.name, name, key) for name in one.gives}
        if (shallow := self._shallow(values, keys)) is not None:
            values |= self._run.carried
            return self._compute(shallow.name, self._beside[shallow.name], values)
        inner = self._main.outputs.keys() - self.outputs.keys()
        outputs = self._compute("main", self._main, values, inner)
        given = {name: outputs.pop(name) for name in outputs.keys() - self.outputs.keys()}
        self._run.carried = given
        return {name: outputs[name] for name in self.outputs}

    def _shallow(
        self, values: Mapping[str, np.ndarray], keys: Mapping[str, object]
    ) -> Entry | None:
        """The companion that runs in place of the main graph at this step, if any."""
        if not self._instead:
            return None
        clock = float(values[self._plan.clock].max())
        shapes = tuple(values[name].shape for name in self._plan.inputs)
        same = (shapes, *(keys[name] for name in self._plan.same))
        step = self._run.next_step(clock, same)
        return next((o for o in self._instead if Schedule(o.schedule).replaces(step)), None)

    def _result(self, one: Entry, key: Key, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
        kept = self._kept[one.name]
        if key not in kept:
            session = self._beside[one.name]
            kept[key] = self._compute(one.name, session, values, one.gives, keep=True)
            if len(kept) > KEPT[one.schedule]:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    def _compute(
        self,
        name: str,
        session: Session,
        values: Mapping[str, Any],
        held: Collection[str] = (),
        *,
        keep: bool = False,
    ) -> dict[str, Any]:
        """What a graph gives; ``held`` is for other graphs only, and stays on their device."""
        self.calls[name] += 1
        feeds = {label: values[label] for label in session.inputs}
        if self._holding and isinstance(session, Holding):
            return session.run_held(feeds, held, keep=keep)
        return session.run(feeds)

    def _ports(self) -> dict[str, Port]:
        """The ports of every graph by name; where two take one input, the narrower dims."""
        found: dict[str, Port] = {}
        for session in (self._main, *self._beside.values()):
            for name, port in session.inputs.items():
                known = found.setdefault(name, port)
                dims = (
                    one if isinstance(one, int) else other
                    for one, other in zip(known.dims, port.dims, strict=True)
                )
                found[name] = Port(known.dtype, tuple(dims))
        if missing := [name for name in self._plan.inputs if name not in found]:
            raise BundleError(
                "the companions of this graph do not fit it",
                where=self._where,
                why=f"none of the graphs takes {', '.join(missing)}",
                hint="make the stage again from the one that it came from",
            )
        return found


class _Run:
    """Where a denoising run is, told by the timesteps that come."""

    def __init__(self) -> None:
        self.carried: dict[str, Any] = {}
        self._step = 0
        self._clock = float("-inf")
        self._same: object = None

    def next_step(self, clock: float, same: object) -> int:
        """The number of this step in its run, 0 where it begins one."""
        goes_on = bool(self.carried) and same == self._same
        # The same timestep again is a run of one step after another, or later a scheduler's way.
        goes_on &= clock < self._clock or (clock == self._clock and self._step > 0)
        self._step = self._step + 1 if goes_on else 0
        self._clock, self._same = clock, same
        return self._step


def _key(array: np.ndarray) -> Key:
    return (array.dtype.str, array.shape, array.tobytes())
