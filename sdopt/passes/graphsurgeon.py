"""``graphsurgeon=module.function``: runs a user's own onnx-graphsurgeon script as a pass."""

from __future__ import annotations

import contextlib
import importlib
import io
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from sdopt.errors import MissingDependencyError, SdoptError
from sdopt.passes import _external, _surgeon
from sdopt.passes.base import Interface, Numerics, Pass, PassContext


@dataclass(frozen=True)
class Graphsurgeon(Pass):
    """Run your own onnx-graphsurgeon function on the graph, with the weights left outside.

    Before / After:
        def function(graph: gs.Graph) -> gs.Graph | None: ...   decides; None is in place

    Applies when: always; the function is imported and called, so it must be code that you trust.
    A weight is read when the function asks for its ``values`` and no earlier. One that it did
    not read, or read and left as it was, stays in its file; one that it changed or made is
    written. Nodes that keep their name, or whose output does, keep their module path. A function
    that adds nodes ends with ``graph.cleanup().toposort()``. What it prints becomes a note.

    Numerics: lossy, since only the function knows what it changes; inputs and outputs may change.

    Options:
        function: ``module.function``; the module must be importable (PYTHONPATH=FOLDER helps).

    Example:
        PYTHONPATH=. sdopt optimize BUNDLE --passes clean,graphsurgeon=my_edits.drop_dropouts
    """

    function: str

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    interface: ClassVar[Interface] = Interface.CHANGES

    def __post_init__(self) -> None:
        parts = self.function.split(".")
        if len(parts) < 2 or not all(part.isidentifier() for part in parts):
            raise ValueError(f"function must be MODULE.FUNCTION, not {self.function!r}")

    def reads(self) -> tuple[str, ...]:
        """The package's version and the digest of the function's own module."""
        _package()
        self._script()
        return _external.decided_by("onnx-graphsurgeon", self.function.rpartition(".")[0])

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Import into graphsurgeon, call the function, take the result back.

        Raises:
            MissingDependencyError: onnx-graphsurgeon is not installed.
            SdoptError: the function is not there, raises, or leaves no valid graph.
        """
        gs, script = _package(), self._script()
        _surgeon.refuse_what_would_be_lost(model)
        outside = _external.Outside(model)
        said = io.StringIO()
        # The package's logger prints to stdout, where `--json` puts its document.
        with contextlib.redirect_stdout(said):
            made = self._run(gs, script, outside)
        for line in dict.fromkeys(said.getvalue().splitlines()):
            ctx.note(line)
        try:
            changed = outside.adopt(made)
        except onnx.checker.ValidationError as error:
            raise self._error(
                "left a graph that is not valid",
                str(error),
                "end it with graph.cleanup().toposort(), and check what it connects",
            ) from error
        if changed:
            ctx.count("script applied")

    def _script(self) -> Callable[[Any], Any]:
        module, _, name = self.function.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as error:
            raise self._error(
                "cannot be imported",
                f"{type(error).__name__}: {error}",
                f"put the folder of {module.split('.')[0]} on PYTHONPATH, or correct the name",
            ) from error
        if not callable(found):
            raise self._error(
                "is not a function", f"it is a {type(found).__name__}", "name the function itself"
            )
        return found  # type: ignore[no-any-return]

    def _run(
        self, gs: Any, script: Callable[[Any], Any], outside: _external.Outside
    ) -> onnx.ModelProto:
        """The graph that the script makes, with stand-ins for every weight, read or not."""
        try:
            surgeon = gs.import_onnx(outside.proto)
        except Exception as error:
            raise self._error(
                "cannot be given this graph", str(error), "run clean first"
            ) from error
        weights = _surgeon.Weights(gs, outside)
        weights.lend(surgeon)
        try:
            result = script(surgeon)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            hint = "correct it there, or run the pipeline without it"
            raise self._error("failed", why, hint) from error
        if result is not None and not isinstance(result, gs.Graph):
            why = f"it returned {type(result).__name__}"
            raise self._error("gave back no graph", why, "return a gs.Graph, or None for in place")
        surgeon = surgeon if result is None else result
        try:
            weights.take_back(surgeon)
            made: onnx.ModelProto = gs.export_onnx(surgeon)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            hint = "inputs and outputs need a dtype, new tensors and nodes a name"
            raise self._error("left a graph that cannot be exported", why, hint) from error
        _surgeon.drop_captured_copies(made.graph, {})
        _surgeon.keep_optional_inputs(outside.proto.graph, made.graph)
        return made

    def _error(self, what: str, why: str, hint: str) -> SdoptError:
        return SdoptError(
            f"the script {self.function} {what}", where=str(self), why=why, hint=hint
        )


def _package() -> Any:
    try:
        return importlib.import_module("onnx_graphsurgeon")
    except ImportError as error:
        raise MissingDependencyError(
            "the pass graphsurgeon needs onnx-graphsurgeon",
            why=str(error),
            hint='pip install "sdopt[graphsurgeon]"',
        ) from error
