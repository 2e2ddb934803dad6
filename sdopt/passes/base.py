"""What a pass is: a frozen dataclass that declares what it does and rewrites a model in place."""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

from sdopt import companions, graph, spec
from sdopt.report import Skip, is_kind
from sdopt.tolerance import Intent, Numerics

__all__ = ["ANY", "Intent", "Interface", "Numerics", "Pass", "PassContext", "Reach", "Role"]


class Role(enum.Enum):
    """What a component is for; a pass says which it applies to."""

    TEXT_ENCODER = "text encoder"
    DENOISER = "denoiser"
    CONTROLNET = "controlnet"
    VAE_ENCODER = "vae encoder"
    VAE_DECODER = "vae decoder"
    MODEL = "model"
    """A single ONNX file about which nothing is known."""


ANY = frozenset(Role)


class Interface(enum.Enum):
    """Whether a pass keeps the graph's inputs and outputs (names, types, order)."""

    KEEPS = "keeps"
    CHANGES = "changes"


class Reach(enum.Enum):
    """What a pass is applied to where a stage has companions beside its main graph."""

    EACH = "each"
    """The main graph and every companion, one after another."""
    MAIN = "main"
    """The main graph only; it knows of the companions."""
    WHOLE = "whole"
    """A graph that nothing was moved out of: with companions it is refused."""


@dataclass
class PassContext:
    """What a pass is given, and where it says what it did.

    Attributes:
        role: the component's role.
        config: the component's configuration (``config.json`` as a dict; empty if unknown).
        seed: the seed of passes that draw.
        target: name of the target that the graph is prepared for, or None.
    """

    model: ir.Model
    role: Role = Role.MODEL
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    target: str | None = None
    rewrites: dict[str, int] = field(default_factory=dict)
    present: dict[str, int] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _names: set[str] | None = None

    def unique(self, hint: str) -> str:
        """A value or node name that nothing in the model has yet."""
        if self._names is None:
            self._names = _all_names(self.model)
        name, suffix = hint, 1
        while name in self._names:
            name, suffix = f"{hint}_{suffix}", suffix + 1
        self._names.add(name)
        return name

    def companion(self, name: str, schedule: str) -> ir.Model:
        """The model's companion of that name: the one that is there, or a new, empty graph.

        ``schedule`` says when it runs (``prompt``, ``step``, ``every=3``; see
        ``companions.Schedule``). Values go from graph to graph by name.
        """
        attached = companions.attach(self.model)
        if name not in attached.graphs:
            one = ir.Graph(
                [], [], nodes=[], name=name, opset_imports=dict(self.model.opset_imports)
            )
            functions = [function.clone() for function in self.model.functions.values()]
            made = ir.Model(one, ir_version=self.model.ir_version, functions=functions)
            attached.graphs[name] = companions.Companion(made, companions.Schedule(schedule))
        return attached.graphs[name].model

    def emitter(self, anchor: ir.Node, label: str) -> graph.Emitter:
        """Inserts nodes before ``anchor``; new names start with ``label``."""
        return graph.Emitter(anchor, self.unique, label)

    def count(self, what: str, times: int = 1) -> None:
        """Record ``times`` rewrites of the kind ``what`` (``group_norm``).

        Several words (``no-op removed``) are no kind: they tally what has no places to be left.
        """
        self.rewrites[what] = self.rewrites.get(what, 0) + times

    def already(self, what: str, times: int = 1) -> None:
        """Record ``times`` places of the kind ``what`` that have the wanted form without us.

        Raises:
            ValueError: ``what`` is no kind, which is one word.
        """
        self.present[_kind(what)] = self.present.get(what, 0) + times

    def skip(self, reason: str, where: ir.Node | str, kind: str = "") -> None:
        """Record a place that was left alone, and why; it counts as found where it is of a kind.

        Raises:
            ValueError: ``kind`` is not one word.
        """
        if kind:
            _kind(kind)
        place = where if isinstance(where, str) else graph.module_path(where)
        self.skips.append(Skip(reason, place, kind))

    def note(self, text: str) -> None:
        """Record something a user should know about the result."""
        self.notes.append(text)


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One rewrite of a graph. Subclasses are frozen dataclasses whose fields are the options.

    The class name, the file name and the CLI word are one name (``FuseQkv``, ``fuse_qkv.py``,
    ``fuse_qkv``); the first field is the value after ``=`` (``tome=5``), ``str()`` prints the
    text that parses back to the same pass.
    """

    numerics: ClassVar[Numerics]
    intent: ClassVar[Intent] = Intent.SAME
    """Whether the result means to compute the same function."""
    roles: ClassVar[frozenset[Role]] = ANY
    after: ClassVar[tuple[str, ...]] = ()
    """Names of passes that must not come later than this one in the same pipeline."""
    interface: ClassVar[Interface] = Interface.KEEPS
    reach: ClassVar[Reach] = Reach.EACH
    """What it is applied to where the stage has companions."""
    vendor_ops: ClassVar[frozenset[str]] = frozenset()
    """Operators that it may write into the standard domain though ONNX has none of that name,
    because a vendor's compiler expects them there; onnx's checker is not asked about them."""
    once: ClassVar[bool] = False
    """Whether a second application is refused, because it would not be the same as one."""

    @classmethod
    def name(cls) -> str:
        """The word on the command line."""
        return spec.snake_case(cls.__name__)

    def changes_interface(self) -> bool:
        """Whether these options change the graph's inputs or outputs."""
        return self.interface is Interface.CHANGES

    def exactness(self) -> Numerics:
        """How exact these options are; the class's ``numerics`` unless an option changes it."""
        return self.numerics

    def reads(self) -> tuple[str, ...]:
        """Digests of the files that the options name: they decide the result as options do."""
        return ()

    def draws(self) -> bool:
        """Whether the run's seed decides the result as well."""
        return False

    @abc.abstractmethod
    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Rewrite ``model`` in place; say what was done and left through ``ctx``."""

    def __str__(self) -> str:
        return str(spec.unbind(self, self.name()))


def _kind(word: str) -> str:
    if not is_kind(word):
        raise ValueError(f"a kind is one word with underscores, not {word!r}")
    return word


def _all_names(model: ir.Model) -> set[str]:
    names: set[str] = set()
    graphs: Sequence[ir.Graph] = list(model.graphs())
    for one in graphs:
        names.update(v.name for v in one.inputs if v.name)
        names.update(one.initializers)
        for node in one:
            names.update(v.name for v in node.outputs if v.name)
            if node.name:
                names.add(node.name)
    return names
