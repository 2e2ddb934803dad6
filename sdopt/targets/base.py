"""What a target is: a frozen dataclass that knows its dialect, its lowering, and how to open."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from sdopt import graph, spec, wellformed
from sdopt.bundle import check_stage_name
from sdopt.errors import BuildError, MissingDependencyError, UsageError
from sdopt.machine import version_of
from sdopt.passes.base import Role
from sdopt.report import Progress
from sdopt.session import Session
from sdopt.shapes import Extent, Request, Sizes


@dataclass(frozen=True)
class Dialect:
    """What a target's compiler or runtime takes.

    Attributes:
        max_opset: of the standard operator set.
        max_ir: of the ONNX file format.
        domains: of operators beside the standard one.
        refused: ``op`` or ``domain::op`` to the reason why it cannot be taken.
        min_opset: of the standard operator set.
        known: ``op`` or ``domain::op`` that it takes; empty where it takes all of its domains.
        dtypes: element types of values; empty where it takes all.
    """

    max_opset: int
    max_ir: int
    domains: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    min_opset: int = 1
    known: frozenset[str] = frozenset()
    dtypes: frozenset[ir.DataType] = frozenset()


@dataclass(frozen=True)
class Order:
    """One lowered component, as a compiler is given it.

    Attributes:
        component: its name in the bundle.
        role: what it is for.
        lowered: the ONNX file.
        profiles: per profile and input the extents of every axis.
        sizes: the profiles' image sizes, in the same order.
        batch: images at once, from least to greatest.
        progress: is told what the compiler does.
        family: the family of the model (``sd1``), where it is known.
    """

    component: str
    role: Role
    lowered: Path
    profiles: Sequence[Mapping[str, Sequence[Extent]]]
    sizes: Sequence[Sizes]
    batch: tuple[int, int]
    progress: Progress
    family: str = ""


@dataclass(frozen=True)
class Target(abc.ABC):
    """Something that runs graphs. Subclasses are frozen dataclasses whose fields are options.

    As with passes, class name, file name and the word on the command line are one name, and
    ``str()`` prints the text that parses back to the same target. ``stage`` names what a build
    writes and a session opens, so that builds of one target stand side by side.
    """

    stage: str = field(default="", kw_only=True)
    dialect: ClassVar[Dialect]
    packages: ClassVar[Mapping[str, str]]
    """Importable module to the distribution that brings it, for what the target needs."""
    extra: ClassVar[str]
    """The extra of sdopt that installs them."""
    compiled: ClassVar[bool] = False
    """Whether a compiler makes the artifact; otherwise the lowered graph itself is run."""

    @classmethod
    def name(cls) -> str:
        """The word on the command line."""
        return spec.snake_case(cls.__name__)

    @property
    @abc.abstractmethod
    def wants(self) -> str:
        """The spec of the passes that lower a canonical graph to what runs fastest here."""

    @abc.abstractmethod
    def stage_name(self) -> str:
        """The stage that a build for this target writes: ``self.called("ort_cpu")``."""

    def called(self, usual: str) -> str:
        """The name that was asked for, else the usual one; UsageError where it can be no name."""
        if self.stage:
            check_stage_name(self.stage)
        return self.stage or usual

    def takes(self) -> Dialect:
        """The dialect with these options; the class's ``dialect`` unless an option changes it."""
        return self.dialect

    def lowering(self, role: Role) -> str:
        """The spec of the passes for a component of that role; ``wants`` unless it differs."""
        return self.wants

    def sized(self, request: Request) -> Target:
        """The target for these sizes; itself unless its lowering depends on them.

        Raises:
            UsageError: sizes that it cannot build for.
        """
        return self

    def artifact_name(self, order: Order) -> str | None:
        """The file that the compiler makes of a component; None where the graph is run itself."""
        return None

    def artifact_path(self, order: Order) -> Path | None:
        """Where the artifact goes: beside the lowered graph, unless its runtime wants another."""
        name = self.artifact_name(order)
        return order.lowered.with_name(name) if name is not None else None

    def deciding(self) -> str:
        """The options that decide the lowered graph and the artifact, as text."""
        return str(self)

    def compile(self, order: Order, made: Path) -> dict[str, Any]:
        """Compile a component into the file ``made``, in a folder of its own.

        Returns:
            What the compiler said of it, for the report and the artifact's record.

        Raises:
            MissingDependencyError: the compiler is not installed.
            BuildError: it refused or failed, in its own words.
            UsageError: sizes or options that it cannot take.
        """
        raise NotImplementedError(f"{self.name()} has no compiler")

    def check(self, order: Order) -> list[str]:
        """Let the compiler's own parser judge a lowered graph, where that is installed.

        Returns:
            Notes on what was and what could not be checked.

        Raises:
            BuildError: it refuses the graph; names node, module path and what to do.
        """
        return [f"{order.component}: in the dialect of {self.name()}"]

    def commands(self, orders: Sequence[Order]) -> list[str]:
        """Shell lines that make the artifacts from the lowered graphs, on a machine that can.

        Paths are relative to the folder that holds the components' folders. None where the lowered
        graph is the artifact.
        """
        return []

    def notes(self) -> list[str]:
        """What a user should know of these options, for the report of every build."""
        return []

    def remarks(self, orders: Sequence[Order]) -> list[str]:
        """Lines for whoever copies the lowered graphs: what the other machine must have."""
        return []

    def compiler(self) -> Mapping[str, str]:
        """Name and version of the compiler that ``compile`` would run; empty if there is none."""
        return {}

    def cuda_device(self) -> int | None:
        """The NVIDIA card that sessions compute on, by CUDA's number; None for anything else."""
        return None

    @abc.abstractmethod
    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """Open an ONNX file; ``optimize=False`` computes node by node, as comparisons want.

        Raises:
            MissingDependencyError: the runtime is not installed.
            BuildError: it refuses the graph.
        """

    def open_adapted(
        self, path: Path, weights: Mapping[str, ir.TensorProtocol], *, optimize: bool = True
    ) -> Session:
        """Open an ONNX file with some of its initializers replaced, as adapters want.

        Raises:
            UsageError: the target cannot change the weights of what it built.
        """
        raise UsageError(
            f"the weights of a build for {self.name()} cannot be changed",
            where=str(path),
            hint="merge the adapter and build that: "
            "sdopt optimize --from model --passes lora=FILE,...",
        )

    def check_available(self) -> None:
        """See that the packages behind the target are installed.

        Raises:
            MissingDependencyError: with the command that installs them.
        """
        missing = [
            package
            for module, package in self.packages.items()
            if importlib.util.find_spec(module) is None
        ]
        if missing:
            raise MissingDependencyError(
                f"the target {self.name()} needs {', '.join(missing)}",
                hint=f'pip install "sdopt[{self.extra}]"'
                + ", or write the graph and its commands for another machine: --emit-only"
                * self.compiled,
            )

    def versions(self) -> dict[str, str]:
        """Versions of what decides the artifact and how it runs.

        Raises:
            MissingDependencyError: the packages are not installed.
        """
        self.check_available()
        return dict(version_of(module, package) for module, package in self.packages.items())

    def lowering_versions(self) -> dict[str, str]:
        """Versions of what decides the lowered graph; those of a compiler decide its artifact."""
        return {} if self.compiled else self.versions()

    def check_legal(self, model: ir.Model) -> None:
        """See that a lowered graph is in the dialect.

        Raises:
            BuildError: naming the first node that is not, its module path, and the reason.
        """
        dialect = self.takes()
        if graph.opset(model) > dialect.max_opset:
            raise BuildError(
                f"{self.name()} takes operators up to opset {dialect.max_opset}",
                why=f"the graph is written in opset {graph.opset(model)}",
                hint="export it again with a lower opset",
            )
        if graph.opset(model) < dialect.min_opset:
            raise BuildError(
                f"{self.name()} takes operators from opset {dialect.min_opset} on",
                why=f"the graph is written in opset {graph.opset(model)}",
                hint="raise it first: sdopt optimize --passes raise_ops",
            )
        if model.ir_version > dialect.max_ir:
            opset = wellformed.opset_of_version(dialect.max_ir, graph.opset(model))
            raise BuildError(
                f"{self.name()} reads ONNX files up to IR version {dialect.max_ir}",
                why=f"the graph is of version {model.ir_version}",
                hint=f"lower both to what it reads: sdopt optimize --passes lower_opset={opset}",
            )
        inlined = {(function.domain, function.name) for function in model.functions.values()}
        for node in graph.nodes(model):
            if (node.domain, node.op_type) not in inlined and (
                why := self._illegal(node, graph.opset(model))
            ):
                raise BuildError(
                    f"{self.name()} cannot take {_operator(node)}",
                    where=f"{graph.module_path(node)} (node {node.name})",
                    why=why,
                    hint=f"passes that lower it come with: sdopt build --target {self}",
                )

    def _illegal(self, node: ir.Node, opset: int) -> str | None:
        """Why a node of a graph in that opset is not in the dialect."""
        dialect = self.takes()
        if reason := dialect.refused.get(_operator(node)):
            return reason
        if node.domain not in ("", "ai.onnx", *dialect.domains):
            return f"it knows no operators of the domain {node.domain!r}"
        if dialect.known and _operator(node) not in dialect.known:
            return "it is not among the operators that its compiler has"
        types = {value.dtype for value in node.outputs if value.dtype is not None}
        if dialect.dtypes and (strange := types - dialect.dtypes):
            return f"it makes {', '.join(sorted(str(t).lower() for t in strange))}"
        return None

    def __str__(self) -> str:
        return str(spec.unbind(self, self.name()))


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
