"""The task ``build``: what is built once for equal graphs, whichever recipes led to them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from sdopt import artifacts, building, provenance, registry
from sdopt.bundle import Bundle
from sdopt.companions import PLAN_KEY, Plan
from sdopt.passes.base import Role
from sdopt.sweep.place import Place
from sdopt.sweep.records import Found, Task
from sdopt.sweep.staging import files_of
from sdopt.targets.base import Order, Target


def do(task: Task, place: Place) -> Found:
    """Lower a stage for a target and compile it, unless the same graphs were built before.

    ``work``: ``source`` (a stage), ``target``, ``shape``, ``batch``, ``components``. Found:
    ``stage`` that the build is called, ``graphs`` and ``digests`` by component (of what was
    lowered, and of the build), ``artifacts`` where a compiler made them, and ``reused``: whether
    the same had been built for another recipe.

    Raises:
        BuildError: the target refuses the graph.
        SdoptError: see ``sdopt.building.build``.
    """
    work = task.work
    target = registry.make("targets", work["target"])
    batch = int(work["batch"])
    with place.writing() as waited:
        bundle = Bundle.open(place.bundle)
        graphs = {
            name: content(bundle.stage(name, work["source"]).path) for name in work["components"]
        }
        target.check_available()
        versions = {**target.lowering_versions(), **target.compiler()}
        deciding = [graphs, target.deciding(), work["shape"], batch, versions]
        stage = f"built-{provenance.key(deciding)}"
        named = dataclasses.replace(target, stage=stage)
        plan = building.Plan(work["shape"], (batch, batch))
        reused = _is_there(bundle, named, work)
        if not reused:
            plan = building.Plan(work["shape"], (batch, batch))
            names = work["components"]
            building.build(bundle, named, plan, components=names, source=work["source"])
        made = _artifacts(bundle, named, work)
        files = [path for one, _ in made.values() for path in (one, artifacts.record_path(one))]
        paths = [*(str(one.relative_to(place.root)) for one in files)]
        paths += files_of(bundle, stage, work["components"], place.root)
    data: dict[str, Any] = {
        "stage": stage,
        "graphs": graphs,
        "digests": {name: bundle.stage(name, stage).digest for name in graphs},
        "artifacts": {name: dataclasses.asdict(one) for name, (_, one) in made.items()},
        "reused": reused,
    }
    return Found(data, tuple(paths), waited)


def _is_there(bundle: Bundle, target: Target, work: Mapping[str, Any]) -> bool:
    """Whether the build was made of equal graphs before, and is whole."""
    names = work["components"]
    if not all(target.stage_name() in bundle.stages(name) for name in names):
        return False
    return not target.compiled or len(_artifacts(bundle, target, work)) == len(names)


def content(path: Path) -> str:
    """A digest of what a graph computes, whatever its stage is called and was made of.

    A data file's name ends in a digest of what it holds, so that stands for the weights.
    """
    model = onnx.load(path, load_external_data=False)
    texts = {one.key: one.value for one in model.metadata_props}
    del model.metadata_props[:]
    for graph in _graphs(model.graph):
        for entry in (entry for one in graph.initializer for entry in one.external_data):
            if entry.key == "location":
                entry.value = entry.value.rpartition("-")[2]
    state = hashlib.sha256(model.SerializeToString(deterministic=True))
    if PLAN_KEY in texts:
        plan = Plan.loads(texts[PLAN_KEY], str(path))
        parts = [dataclasses.replace(one, file="") for one in plan.graphs]
        state.update(dataclasses.replace(plan, graphs=tuple(parts)).dumps().encode())
        for one in plan.graphs:
            state.update(content(path.with_name(one.file)).encode())
    return state.hexdigest()[:16]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for one in (attribute.g, *attribute.graphs):
                if one.node or one.initializer:
                    yield from _graphs(one)


def _artifacts(
    bundle: Bundle, target: Target, work: Mapping[str, Any]
) -> dict[str, tuple[Path, artifacts.Artifact]]:
    """The compiled files of a build by component; none where the graph itself is run."""
    found = {}
    for name in work["components"]:
        stage = bundle.stage(name, target.stage_name())
        role, family = Role(stage.record.role), stage.record.family
        order = Order(
            name, role, stage.path, [], [], (work["batch"],) * 2, lambda what, share: None, family
        )
        path = target.artifact_path(order)
        if path is not None and (known := artifacts.recorded(path)) is not None:
            found[name] = (path, known)
    return found
