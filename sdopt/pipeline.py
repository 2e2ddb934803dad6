"""A pipeline is a value: parsed from text, printed back to it, planned, and run with checks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from sdopt import companions, graph, modelfile, registry, spec
from sdopt.errors import BundleError, PassError, SdoptError, SpecError, UnknownNameError
from sdopt.fingerprint import fingerprint
from sdopt.manifest import Step
from sdopt.passes.base import Pass, PassContext, Reach, Role
from sdopt.passes.presets import PRESETS
from sdopt.report import PassReport, Progress, Skip, part
from sdopt.weights import identity

Signature = list[tuple[str | None, str]]


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read ``clean,fuse_qkv,tome=5:ratio=0.5,@fast`` or the path of a recipe file.

        A recipe file ends in ``.recipe`` or ``.txt`` and holds the same items, one or more to a
        line, with ``#`` comments.

        Raises:
            SpecError: text that cannot be read, a wrong option, or a pass before one that must
                precede it.
            UnknownNameError: an unknown pass or preset, with a caret and the nearest names.
        """
        if text.endswith((".recipe", ".txt")):
            text = spec.read_recipe(Path(text))
        passes = tuple(_expand(spec.parse(text), text))
        _check_order(passes, text)
        return cls(passes)

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def for_role(self, role: Role) -> Pipeline:
        """Only the passes that apply to components of that role."""
        return Pipeline(tuple(p for p in self.passes if role in p.roles))

    def reads(self) -> list[str]:
        """Digests of the files that the passes' options name."""
        return [digest for one in self.passes for digest in one.reads()]

    def refuse_repeats(self, history: Iterable[Step], where: str) -> None:
        """Refuse a pass that must run once and is in the stage's history already.

        Raises:
            SdoptError: naming the pass and how to start from a stage without it.
        """
        done = {item.name for step in history for item in spec.parse(step.spec)}
        for one in self.passes:
            if one.once and one.name() in done:
                raise SdoptError(
                    f"{one.name()} was applied to this stage already",
                    where=where,
                    why="a second application would not be the same as one",
                    hint="start from a stage without it: --from model",
                )

    def run(self, model: ir.Model, ctx: RunContext) -> list[PassReport]:
        """Apply each pass, checking the graph between them; returns one report per pass.

        Raises:
            BundleError: the graph is not valid ONNX to begin with.
            PassError: a pass failed or broke an invariant; names it and the ones before it.
        """
        _refuse_invalid(model, ctx.component)
        reports: list[PassReport] = []
        for index, one in enumerate(self.passes):
            part(ctx.progress, index, len(self.passes))(str(one), 0.0)
            try:
                reports.append(_run_one(one, model, ctx))
            except SdoptError:
                raise
            except Exception as error:
                before = ", ".join(r.spec for r in reports) or "none"
                raise PassError(
                    f"the pass {one} failed",
                    where=ctx.component,
                    why=f"{type(error).__name__}: {error} (passes before it: {before})",
                    hint="this is a bug in the pass: run without it, and report it with the model",
                ) from error
        return reports


@dataclass
class RunContext:
    """What the passes of one run are told about the component they rewrite."""

    component: str = "model"
    role: Role = Role.MODEL
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    target: str | None = None
    progress: Progress | None = None


def _refuse_invalid(model: ir.Model, component: str) -> None:
    """Refuse a graph that onnx's checker refuses, before a pass is blamed for it."""
    for one in companions.family(model):
        try:
            modelfile.check(one, graph.vendor_ops(one))
        except (onnx.checker.ValidationError, RuntimeError, ValueError, TypeError) as error:
            raise BundleError(
                "this graph is not valid ONNX, so no pass is run on it",
                where=component,
                why=f"onnx's checker says: {str(error)[:400]}",
                hint="export it again, or correct what wrote it",
            ) from error


def _run_one(one: Pass, model: ir.Model, run: RunContext) -> PassReport:
    vendor_ops = one.vendor_ops.union(*map(graph.vendor_ops, companions.family(model)))
    earlier = companions.graphs(model)
    _refuse_companions(one, earlier, run.component)
    before, ops_before = fingerprint(model), _ops(model)
    signatures = {name: _io(each) for name, each in earlier.items()} | {"": _io(model)}
    known = _weights(model).keys()
    contexts: dict[str, PassContext] = {}
    reached = {"": model, **(earlier if one.reach is Reach.EACH else {})}
    start = time.perf_counter()
    for name, each in reached.items():
        contexts[name] = PassContext(
            model=each, role=run.role, config=run.config, seed=run.seed, target=run.target
        )
        one.apply(each, contexts[name])
    companions.settle_types(model)
    seconds = time.perf_counter() - start
    changed = fingerprint(model) != before
    if changed:
        companions.settle_ir_versions(model)
        for name, each in {"": model, **companions.graphs(model)}.items():
            _check(one, each, signatures.get(name), run.component, vendor_ops)
        if why := companions.broken_wire(model):
            raise _broken(one, run.component, why)
    ops_after, new = _ops(model), _weights(model)
    return PassReport(
        spec=str(one),
        numerics=one.exactness().value,
        intent=one.intent.value,
        seconds=seconds,
        nodes_before=sum(ops_before.values()),
        nodes_after=sum(ops_after.values()),
        ops_before=ops_before,
        ops_after=ops_after,
        rewrites=_sum(c.rewrites for c in contexts.values()),
        skips=tuple(skip for n, c in contexts.items() for skip in _labelled(n, c.skips)),
        notes=tuple(
            f"{name}: {note}" if name else note for name, c in contexts.items() for note in c.notes
        ),
        new_bytes=sum(size for key, size in new.items() if key not in known),
        changed=changed,
        present=_sum(c.present for c in contexts.values()),
        reads=(*one.reads(), *([f"seed {run.seed}"] if one.draws() else [])),
    )


def _refuse_companions(one: Pass, earlier: dict[str, ir.Model], component: str) -> None:
    """Refuse a pass that needs one whole graph where work was moved out of it.

    Raises:
        SdoptError: naming the companions and what to do.
    """
    if one.reach is Reach.WHOLE and earlier:
        raise SdoptError(
            f"{one.name()} cannot be applied to a graph with companions",
            where=component,
            why=f"a part of it was moved to {' and '.join(earlier)}",
            hint=f"put {one.name()} in front of the pass that moved it, or start from the stage "
            "before: --from model",
        )


def _ops(model: ir.Model) -> dict[str, int]:
    """Operator counts of the main graph and its companions together."""
    return _sum(graph.op_counts(each) for each in companions.family(model))


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return {name: count for name, count in total.items() if count}


def _weights(model: ir.Model) -> dict[Hashable, int]:
    """What each weight is to its size in bytes."""
    values = (v for each in companions.family(model) for v in modelfile.initializers(each))
    tensors = (value.const_value for value in values)
    return {identity(tensor): tensor.nbytes for tensor in tensors if tensor is not None}


def _labelled(companion: str, skips: Iterable[Skip]) -> Iterable[Skip]:
    for skip in skips:
        where = f"{skip.where} (companion {companion})" if companion else skip.where
        yield Skip(skip.reason, where, skip.kind)


def _io(model: ir.Model) -> tuple[Signature, Signature]:
    return (
        [(value.name, str(value.type)) for value in model.graph.inputs],
        [(value.name, str(value.type)) for value in model.graph.outputs],
    )


def _broken(one: Pass, component: str, why: str) -> PassError:
    return PassError(
        f"the pass {one} broke the graph",
        where=component,
        why=why,
        hint="this is a bug in the pass: run without it, and report it with the model",
    )


def _check(
    one: Pass,
    model: ir.Model,
    signature: tuple[Signature, Signature] | None,
    component: str,
    vendor_ops: frozenset[str],
) -> None:
    """The invariants that hold between passes, whoever wrote them.

    ``vendor_ops`` are those that were there before and those that the pass declares;
    ``signature`` is what the graph took and gave before; None for a graph that the pass added.
    """
    if signature is not None and not one.changes_interface() and _io(model) != signature:
        raise _broken(one, component, f"inputs and outputs were {signature} and are {_io(model)}")
    names: set[str] = set()
    names.update(value.name or "" for value in model.graph.inputs)
    names.update(model.graph.initializers)
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name not in names:
                why = f"{graph.module_path(node)} reads {value.name!r} before it is made"
                raise _broken(one, component, why)
        for value in node.outputs:
            if value.name and value.name in names:
                raise _broken(one, component, f"two values are called {value.name!r}")
            names.add(value.name or "")
    for value in modelfile.initializers(model):
        if value.const_value is None:
            raise _broken(one, component, f"the weight {value.name!r} has no value")
    try:
        modelfile.check(model, vendor_ops)
    except (onnx.checker.ValidationError, RuntimeError) as error:
        raise _broken(one, component, f"onnx's checker says: {error}") from error


def _expand(items: Iterable[spec.Item], text: str) -> Iterable[Pass]:
    for item in items:
        if item.name.startswith("@"):
            name = item.name[1:]
            if name not in PRESETS:
                raise _unknown(item, f"unknown preset {item.name!r}", name, PRESETS)
            yield from _expand(spec.parse(PRESETS[name]), text)
            continue
        known = registry.table("passes")
        if item.name not in known:
            raise _unknown(item, f"unknown pass {item.name!r}", item.name, known)
        yield spec.bind(registry.resolve("passes", item.name), item)


def _unknown(item: spec.Item, message: str, name: str, known: Iterable[str]) -> UnknownNameError:
    start = item.span[0]
    pointed = spec.pointed(message, item.text, (start, start + len(item.name)))
    return UnknownNameError(message, where=pointed.where, hint=spec.suggest(name, known))


def _check_order(passes: tuple[Pass, ...], text: str) -> None:
    names = [one.name() for one in passes]
    for index, one in enumerate(passes):
        for earlier in one.after:
            if earlier in names[index + 1 :] and earlier not in names[:index]:
                raise SpecError(
                    f"{one.name()} must come after {earlier}",
                    where=text,
                    hint=f"move {earlier} in front of {one.name()}",
                )
