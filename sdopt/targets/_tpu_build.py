"""What is run to make a .bmodel: per size a transform and a deploy, then one combine.

The same steps are run here and written down by ``--emit-only``.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt.errors import BuildError
from sdopt.report import Progress
from sdopt.targets._tpu_request import Shapes
from sdopt.targets._tpu_tools import Tools

TABLE = "calibration_table"


@dataclass(frozen=True)
class Settings:
    """What a component is compiled to.

    Attributes:
        network: its name in the bmodel; the sizes of one network share it.
        chip: such as ``bm1684x``.
        quantize: Sophgo's word for the type, such as ``BF16``.
        cores: of the chip that one inference uses.
        samples: of a calibration, 0 where the type needs none.
    """

    network: str
    chip: str
    quantize: str
    cores: int = 1
    samples: int = 0


@dataclass(frozen=True)
class Step:
    """One tool with its arguments, and the file that is there when it has worked."""

    tool: str
    arguments: tuple[str, ...]
    makes: str

    def line(self) -> str:
        """The step as a line for a shell."""
        return shlex.join([self.tool, *self.arguments])


@dataclass(frozen=True)
class Stage:
    """One size in a bmodel: the shapes of its inputs and outputs by their names there."""

    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]


def steps(graph: str, made: str, shapes: Sequence[Shapes], settings: Settings) -> list[Step]:
    """All steps, in order; they run in one folder, and paths are as seen from there.

    Args:
        graph: the ONNX file.
        made: the bmodel.
        shapes: of each size.
        settings: what is made; to calibrate, samples lie in ``samples_of`` each size,
            counted from the largest.
    """
    found: list[Step] = []
    parts: list[str] = []
    for index, one in enumerate(largest_first(shapes)):
        stem = f"size{index}"
        part = f"{stem}.bmodel" if len(shapes) > 1 else made
        found.append(_transform(graph, stem, one, settings))
        calibrated: tuple[str, ...] = ()
        if settings.samples:
            table = f"{stem}.{TABLE}"
            words = [f"{stem}.mlir", "--data_list", f"{samples_of(index)}.txt"]
            # The default, kl, cuts off what is rare: also the late timesteps of a recording.
            words += ["--cali_method", "max", "--chip", settings.chip]
            words += ["--input_num", str(settings.samples), "-o", table]
            found.append(Step("run_calibration", tuple(words), table))
            calibrated = ("--calibration_table", table)
        found.append(_deploy(stem, part, settings, calibrated))
        parts.append(part)
    if len(parts) > 1:
        found.append(Step("model_tool", ("--combine", *parts, "-o", made), made))
    return found


def largest_first(shapes: Sequence[Shapes]) -> list[Shapes]:
    """Sizes in the order in which a bmodel must hold them.

    tpu_mlir 1.30.2's runtime gives zeros, without an error, for the smaller sizes where the first
    is not the largest.
    """
    return sorted(shapes, key=_volume, reverse=True)


def samples_of(index: int) -> str:
    """The folder, in the working one, of what a size is calibrated with; a list lies beside it."""
    return f"samples{index}"


def parses(graph: str, shapes: Shapes, settings: Settings) -> Step:
    """The step in which Sophgo's frontend reads a graph at one size."""
    return _transform(graph, "parsed", shapes, settings)


def run(tools: Tools, found: Sequence[Step], folder: Path, progress: Progress) -> None:
    """Run steps in a folder.

    Raises:
        BuildError: a tool failed, or ended well without making what it should.
    """
    for index, step in enumerate(found):
        tools.run(step.tool, step.arguments, folder, _teller(step, index, len(found), progress))
        if not (folder / step.makes).is_file():
            raise BuildError(
                f"Sophgo's {step.tool} ended without an error and without {step.makes}",
                hint="--emit-only writes the lowered graph and the commands, to run them by hand",
            )


def stages(tools: Tools, made: Path, folder: Path) -> list[Stage]:
    """The sizes that a bmodel holds, in order, as the vendor's tool reads them.

    Raises:
        BuildError: it is no whole bmodel.
    """
    said = tools.run("model_tool", ("--info", str(made)), folder, lambda line: None)
    found: list[Stage] = []
    for line in said.splitlines():
        if re.match(r"stage \d+", line):
            found.append(Stage({}, {}))
        elif port := re.match(r"(input|output): (\S+), (\[.*?\]), \w+", line):
            ports = found[-1].inputs if port[1] == "input" else found[-1].outputs
            ports[port[2]] = tuple(json.loads(port[3]))
    return found


def check_stages(
    stages: Sequence[Stage],
    shapes: Sequence[Shapes],
    outputs: Sequence[str],
    component: str,
) -> None:
    """See that a bmodel holds the sizes asked for, in order, and as many outputs as the graph.

    Raises:
        BuildError: it does not.
    """
    wanted = [{name: dims or (1,) for name, dims in one.items()} for one in shapes]
    found = [one.inputs for one in stages]
    if len(found) != len(wanted) or any(
        not a.items() <= b.items() for a, b in zip(found, wanted, strict=True)
    ):
        raise BuildError(
            f"the bmodel of {component} does not hold the sizes asked for",
            why=f"it holds {found}, asked for were {wanted}",
        )
    for one in stages:
        if len(one.outputs) != len(outputs):
            raise BuildError(
                f"the bmodel of {component} has other outputs than the graph",
                why=f"{', '.join(one.outputs)} for {', '.join(outputs)}",
            )


def _transform(graph: str, stem: str, shapes: Shapes, settings: Settings) -> Step:
    # A scalar is of one element to the frontend, which then wants a shape of one axis for it.
    listed = json.dumps([list(shape) or [1] for shape in shapes.values()], separators=(",", ":"))
    words = ("--model_name", settings.network, "--model_def", graph, "--input_shapes", listed)
    return Step("model_transform", (*words, "--mlir", f"{stem}.mlir"), f"{stem}.mlir")


def _deploy(stem: str, part: str, settings: Settings, calibrated: tuple[str, ...]) -> Step:
    words = ["--mlir", f"{stem}.mlir", "--quantize", settings.quantize, "--chip", settings.chip]
    words += calibrated
    words += ["--num_core", str(settings.cores)] * (settings.cores > 1)
    return Step("model_deploy", (*words, "--model", part), part)


def _volume(shapes: Shapes) -> int:
    """How many numbers the inputs hold, which orders sizes."""
    return sum(math.prod(shape) for shape in shapes.values())


def _teller(step: Step, index: int, count: int, progress: Progress) -> Callable[[str], None]:
    def tell(line: str) -> None:
        progress(f"{step.tool}: {line[:80]}", index / count)

    return tell
