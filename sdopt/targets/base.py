"""What a target is: a frozen dataclass that knows its dialect, its lowering, and how to open."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph, spec
from sdopt.errors import BuildError, MissingDependencyError
from sdopt.session import Session


@dataclass(frozen=True)
class Dialect:
    """What a target's compiler or runtime takes.

    Attributes:
        max_opset: of the standard operator set.
        max_ir: of the ONNX file format.
        domains: of operators beside the standard one.
        refused: ``op`` or ``domain::op`` to the reason why it cannot be taken.
    """

    max_opset: int
    max_ir: int
    domains: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target(abc.ABC):
    """Something that runs graphs. Subclasses are frozen dataclasses whose fields are options.

    As with passes, class name, file name and the word on the command line are one name, and
    ``str()`` prints the text that parses back to the same target.
    """

    dialect: ClassVar[Dialect]
    packages: ClassVar[Mapping[str, str]]
    """Importable module to the distribution that brings it, for what the target needs."""
    extra: ClassVar[str]
    """The extra of sdopt that installs them."""

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
        """The stage that a build for this target writes (``ort_cpu``)."""

    @abc.abstractmethod
    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """Open an ONNX file; ``optimize=False`` computes node by node, as comparisons want.

        Raises:
            MissingDependencyError: the runtime is not installed.
            BuildError: it refuses the graph.
        """

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
                hint=f'pip install "sdopt[{self.extra}]"',
            )

    def versions(self) -> dict[str, str]:
        """Versions of what decides the artifact and how it runs.

        Raises:
            MissingDependencyError: the packages are not installed.
        """
        self.check_available()
        return {package: metadata.version(package) for package in self.packages.values()}

    def check_legal(self, model: ir.Model) -> None:
        """See that a lowered graph is in the dialect.

        Raises:
            BuildError: naming the first node that is not, its module path, and the reason.
        """
        dialect = self.dialect
        if graph.opset(model) > dialect.max_opset:
            raise BuildError(
                f"{self.name()} takes operators up to opset {dialect.max_opset}",
                why=f"the graph is written in opset {graph.opset(model)}",
                hint="export it again with a lower opset",
            )
        if model.ir_version > dialect.max_ir:
            raise BuildError(
                f"{self.name()} reads ONNX files up to IR version {dialect.max_ir}",
                why=f"the graph is of version {model.ir_version}",
                hint="write it again with a lower ir_version",
            )
        inlined = {(function.domain, function.name) for function in model.functions.values()}
        for node in graph.nodes(model):
            if (node.domain, node.op_type) not in inlined and (why := self._illegal(node)):
                raise BuildError(
                    f"{self.name()} cannot take {_operator(node)}",
                    where=f"{graph.module_path(node)} (node {node.name})",
                    why=why,
                    hint=f"passes that lower it come with: sdopt build --target {self}",
                )

    def _illegal(self, node: ir.Node) -> str | None:
        if reason := self.dialect.refused.get(_operator(node)):
            return reason
        if node.domain not in ("", "ai.onnx", *self.dialect.domains):
            return f"it knows no operators of the domain {node.domain!r}"
        return None

    def __str__(self) -> str:
        return str(spec.unbind(self, self.name()))


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
