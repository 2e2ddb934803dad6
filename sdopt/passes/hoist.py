"""``hoist``: what stays the same from step to step is computed once, in companion graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import companions, flops, graph
from sdopt.passes import _invariant
from sdopt.passes._extraction import Extraction, like
from sdopt.passes.base import Interface, Numerics, Pass, PassContext, Reach, Role

_WHERE = "the whole graph"


@dataclass(frozen=True)
class Hoist(Pass):
    """Move what depends only on the prompt, or only on the timestep, out of the denoising step.

    Before / After:
        out = f(sample, timestep, encoder_hidden_states)
            ->  keys, values = prompt(encoder_hidden_states)           once per prompt
                time projections = step(timestep, batch_size)          once per value of timestep
                out = f(sample, keys, values, time projections)

    Applies when: an input is known to stay the same within a run (``encoder_hidden_states``,
    ``text_embeds``, ``time_ids``, ...) or to tell the step (``timestep``), by its usual name or by
    the options. Whatever can be computed from those, from constants and from sizes of inputs is
    moved: keys and values of cross-attentions (after ``fuse_qkv`` as one projection each), the
    time embedding and each block's projection of it. Relayouts at the end stay behind, since
    compilers know an attention's operands by them. Where a moved node needs the batch of
    ``sample``, as the time embedding does, the companion takes that size as an input.

    What to expect: little. It moves 0.38 % of the operations of an SD1.5 step at 64x64; a step was
    4 % shorter at best for a prototype on an H200, and took 0.94 to 0.97 of its time on a CPU.

    Numerics: exact; the same nodes compute the same shapes, elsewhere.

    Options:
        prompt: names of the inputs that stay the same, for graphs that call them otherwise.
        step: names of the inputs that tell the step.
    """

    prompt: tuple[str, ...] = ()
    step: tuple[str, ...] = ()

    numerics: ClassVar[Numerics] = Numerics.EXACT
    roles: ClassVar[frozenset[Role]] = frozenset({Role.DENOISER, Role.CONTROLNET, Role.MODEL})
    after: ClassVar[tuple[str, ...]] = ("lora", "raise_ops", "fuse_qkv", "pad_align", "tome")
    interface: ClassVar[Interface] = Interface.CHANGES
    reach: ClassVar[Reach] = Reach.MAIN

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Find the two parts, copy each into its companion, and read their values as inputs."""
        if (reason := _already(companions.graphs(model))) is not None:
            ctx.skip(reason, _WHERE)
            return
        prompt = self._inputs(model, "prompt", ctx)
        step = self._inputs(model, "step", ctx)
        if not prompt and not step:
            ctx.skip(
                "no input is known to stay the same within a run: name them with "
                "hoist:prompt=NAME+NAME:step=NAME",
                _WHERE,
            )
            return
        parts = dict(zip(("prompt", "step"), _parts(model, prompt, step), strict=True))
        parts = {name: one for name, one in parts.items() if _invariant.is_worth_moving(one)}
        if not parts:
            ctx.skip("nothing is computed from the prompt or the timestep alone", _WHERE)
            return
        if not _invariant.state_types(model, [v for one in parts.values() for v in one.gives]):
            ctx.skip("a value to hand over has no known type and rank", _WHERE)
            return
        ctx.note(_saved(model, parts, ctx))
        attached = companions.attach(model)
        attached.clock = attached.clock or next((v.name or "" for v in step), "")
        attached.same = tuple(v.name or "" for v in prompt)
        given: list[ir.Value] = []
        for name, part in parts.items():
            own = [one for one in (*prompt, *step) if set(one.consumers()) & set(part.nodes)]
            copy = Extraction(model, ctx.companion(name, name), given, own)
            for node in part.nodes:
                copy.node(node)
            copy.give(part.gives)
            given += part.gives
            ctx.count(f"{name}_value", len(part.gives))
        _read_from_companions(model, given, parts, [*prompt, *step])

    def _inputs(self, model: ir.Model, option: str, ctx: PassContext) -> list[ir.Value]:
        usual = {"prompt": _invariant.PROMPT_INPUTS, "step": _invariant.STEP_INPUTS}[option]
        asked = {"prompt": self.prompt, "step": self.step}[option]
        found = _invariant.inputs_named(model.graph, asked or usual)
        for name in set(asked) - {value.name for value in found}:
            ctx.skip(f"{option}={name} names no input of this graph", name)
        return found


def _already(known: Mapping[str, ir.Model]) -> str | None:
    if "prompt" in known or "step" in known:
        return "it was hoisted already"
    if known:
        return f"hoist must come before the pass that made the companion {next(iter(known))}"
    return None


def _parts(
    model: ir.Model, prompt: Sequence[ir.Value], step: Sequence[ir.Value]
) -> tuple[_invariant.Region, _invariant.Region]:
    return _invariant.regions(model.graph, _invariant.needs(model.graph, prompt, step))


def _saved(model: ir.Model, parts: Mapping[str, _invariant.Region], ctx: PassContext) -> str:
    """Which share of a step's operations is moved, at a stated size."""
    sizes = flops.sizes_of(ctx.config)
    cost = flops.count(model, sizes)
    moved = {n: sum(cost.by_node.get(node, 0) for node in p.nodes) for n, p in parts.items()}
    shares = ", ".join(f"{part / max(cost.total, 1):.2%} to {n}" for n, part in moved.items())
    missing = f"; {len(cost.unknown)} nodes not counted" if cost.unknown else ""
    return (
        f"of a step's {cost.total / 1e9:.3g} GFLOP moved: {shares} "
        f"({flops.stated(sizes)}{missing})"
    )


def _read_from_companions(
    model: ir.Model,
    given: Sequence[ir.Value],
    parts: Mapping[str, _invariant.Region],
    inputs: Sequence[ir.Value],
) -> None:
    """Let the main graph take the moved values as inputs, and drop what made them."""
    moved = {node for part in parts.values() for node in part.nodes}
    for value in given:
        readers = [(user, i) for user, i in value.uses() if user not in moved]
        if not readers:
            continue  # only the other companion reads it
        taken = like(ir.Value(name=value.name), value)
        for user, index in readers:
            user.replace_input_with(index, taken)
        value.name = f"{value.name}.moved"
        model.graph.inputs.append(taken)
    order = [node for node in model.graph if node in moved]
    graph.remove_dead(reversed(order))
    for value in inputs:
        if not value.uses():
            model.graph.inputs.remove(value)
