"""Which values of a denoiser do not change from step to step, and which part is worth moving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

PROMPT_INPUTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "added_cond_kwargs.text_embeds",
    "added_cond_kwargs.time_ids",
    "text_embeds",
    "time_ids",
    "pooled_projections",
    "guidance",
    "context",
    "prompt_embeds",
)
"""Names that denoisers' exporters give to inputs that stay the same from step to step."""

STEP_INPUTS = ("timestep", "timesteps", "t")
"""Names of the input that tells the step."""

_VIEWS = frozenset(
    {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Expand", "Tile"}
)
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
    | {"Multinomial", "Bernoulli", "Dropout"}
)


class Needs(IntFlag):
    """What a value depends on; nothing means constants and sizes of inputs only."""

    NOTHING = 0
    PROMPT = 1
    STEP = 2
    DATA = 4


@dataclass(frozen=True)
class Region:
    """A part of the main graph that runs less often than it.

    ``nodes`` are in graph order; ``gives`` are those of their values that other nodes read.
    """

    nodes: tuple[ir.Node, ...]
    gives: tuple[ir.Value, ...]


def needs(
    main: ir.Graph, prompt: Sequence[ir.Value], step: Sequence[ir.Value]
) -> dict[ir.Value, Needs]:
    """What each value of the graph depends on.

    The size of an input is no dependence on it: sizes stay the same for a whole run.
    """
    found: dict[ir.Value, Needs] = dict.fromkeys(main.inputs, Needs.DATA)
    found |= dict.fromkeys(prompt, Needs.PROMPT) | dict.fromkeys(step, Needs.STEP)
    for node in main:
        one = Needs.NOTHING
        for value in node.inputs:
            if value is not None:
                one |= found.get(value, Needs.NOTHING)
        if node.op_type == "Shape" and node.inputs[0] in main.inputs:
            one = Needs.NOTHING
        if _must_stay(node):
            one = Needs.DATA
        found.update(dict.fromkeys(node.outputs, one))
    return found


def _must_stay(node: ir.Node) -> bool:
    """A node with a body, a random one, and one that makes an output of the graph."""
    return (
        node.op_type in _RANDOM
        or any(
            attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attr in node.attributes.values()
        )
        or any(value.is_graph_output() for value in node.outputs)
    )


def regions(main: ir.Graph, known: Mapping[ir.Value, Needs]) -> tuple[Region, Region]:
    """What depends on the prompt only, and what depends on the step (and the prompt) only.

    Views at the end stay in the main graph. A Reshape or Transpose costs little there, and it is
    what lowerings and compilers know an attention's operands by; an Expand would make more to
    hand over.
    """
    places = {Needs.PROMPT: 0, Needs.STEP: 1, Needs.STEP | Needs.PROMPT: 1}
    home = {node: places.get(known[node.outputs[0]]) for node in main}
    for node in reversed(list(main)):
        users = [user for value in node.outputs for user in value.consumers()]
        if node.op_type in _VIEWS and all(home.get(user) is None for user in users):
            home[node] = None
    first, second = (
        [node for node, place in home.items() if place == wanted] for wanted in (0, 1)
    )
    made = []
    for nodes, wanted in ((first, 0), (second, 1)):
        gives = [
            value
            for node in nodes
            for value in node.outputs
            if any(home.get(user) != wanted for user in value.consumers())
        ]
        made.append(Region(tuple(nodes), tuple(gives)))
    return made[0], made[1]


def inputs_named(main: ir.Graph, names: Sequence[str]) -> list[ir.Value]:
    """The graph's inputs of those names that no initializer stands behind."""
    return [v for v in main.inputs if v.name in names and not v.is_initializer()]


def is_worth_moving(region: Region) -> bool:
    """Whether a part computes anything."""
    return any(node.op_type not in _VIEWS | {"Cast", "Constant"} for node in region.nodes)


def state_types(model: ir.Model, values: Sequence[ir.Value]) -> bool:
    """State types and shapes of values that graphs hand over; False if one cannot be told.

    Exporters leave intermediate values without them. onnx infers them on a copy, so that nothing
    else of the model changes, and nothing at all where the answer is no.
    """
    missing = [value for value in values if value.dtype is None or value.shape is None]
    if not missing:
        return True
    copy = model.clone()
    ShapeInferencePass()(copy)
    made = {value.name: value for node in copy.graph for value in node.outputs}
    found = [made[value.name] for value in missing]
    if any(value.dtype is None or value.shape is None for value in found):
        return False
    for value, told in zip(missing, found, strict=True):
        value.type, value.shape = told.type, told.shape
    return True
