"""ATC's command line: one per component, for one size or for the gears of several.

Flags and rules: Ascend's ge (ffdcbc9f7), ``api/atc`` and its guide; the components' own flags are
those of Ascend/ModelZoo-PyTorch's stable_diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt import companions, modelfile
from sdopt.errors import UsageError
from sdopt.passes.base import Role
from sdopt.targets.base import Order

MAX_GEARS = 100
_PATH = re.compile(r"[a-zA-Z0-9_./\-\u4e00-\u9fff]+")

_FAST = ('--optypelist_for_implmode="Gelu,Sigmoid"', "--op_select_implmode=high_performance")
"""Of the denoiser, where these two are most of what is not a product."""


@dataclass(frozen=True)
class Shapes:
    """What a command says of sizes: ``--input_shape``, and the flag of the gears if there are."""

    inputs: str
    gears: str = ""
    input_format: str = "NCHW"


def shapes(order: Order, numbers: Sequence[Mapping[str, int]]) -> Shapes:
    """The sizes of one lowered component; ``numbers`` are the dynamic axes' at each gear.

    Raises:
        UsageError: more gears than ATC takes, an axis that nothing says the size of, or a graph
            with companions.
    """
    model = modelfile.load(order.lowered)
    if companions.graphs(model):
        raise UsageError(
            f"{order.component} has companions, and atc builds one graph",
            why=f"parts of it were moved to {' and '.join(companions.graphs(model))}",
            hint="build a stage without hoist and deep_cache: --from optimized",
        )
    inputs = {
        value.name or "": [d if isinstance(d, int) else str(d.value) for d in value.shape or ()]
        for value in model.graph.inputs
    }
    dynamic = [(n, i, d) for n, dims in inputs.items() for i, d in enumerate(dims) if _named(d)]
    for name, _, axis in dynamic:
        if axis not in numbers[0]:
            raise UsageError(
                f"nothing says how large the axis {axis!r} is",
                where=f"{order.component}: {name}",
                hint=f"say it: --dim {axis}=1..16",
            )
    gears = list(dict.fromkeys(tuple(one[str(d)] for _, _, d in dynamic) for one in numbers))
    if len(gears) > MAX_GEARS:
        raise UsageError(
            f"{order.component} would have {len(gears)} gears",
            why=f"ATC takes 2 to {MAX_GEARS}",
            hint="fewer sizes in --shapes, or a smaller --batch range",
        )
    if len(gears) < 2:
        text = _text({n: [numbers[0].get(str(d), d) for d in dims] for n, dims in inputs.items()})
        return Shapes(text, input_format="ND" if order.role is Role.TEXT_ENCODER else "NCHW")
    text = _text({n: [-1 if _named(d) else d for d in dims] for n, dims in inputs.items()})
    if all(axis == 0 for _, axis, _ in dynamic) and len({d for *_, d in dynamic}) == 1:
        sizes = ",".join(str(gear[0]) for gear in gears)
        return Shapes(text, f'--dynamic_batch_size="{sizes}"', "ND")
    sizes = ";".join(",".join(map(str, gear)) for gear in gears)
    return Shapes(text, f'--dynamic_dims="{sizes}"', "ND")


def words(
    order: Order, sizes: Shapes, model: str, output: str, soc: str, precision: str
) -> list[str]:
    """The command's words behind ``atc``, as a shell reads them."""
    found = ["--framework=5", f"--model={model}", f"--output={output}", f"--soc_version={soc}"]
    found += [f"--input_format={sizes.input_format}", f'--input_shape="{sizes.inputs}"']
    found += [sizes.gears] if sizes.gears else []
    found += [f"--precision_mode_v2={precision}"] if precision else []
    found += _FAST if order.role in (Role.DENOISER, Role.CONTROLNET) else ()
    return [*found, "--log=error"]


def check_path(path: Path) -> None:
    """See that a path has no mark that ATC refuses.

    Raises:
        UsageError: naming it.
    """
    if _PATH.fullmatch(str(path)) is None:
        raise UsageError(
            "ATC takes paths of letters, digits, '_', '-' and '.' only",
            where=str(path),
            hint="move the bundle to a folder with such a name",
        )


def _named(dim: int | str) -> bool:
    return isinstance(dim, str)


def _text(inputs: Mapping[str, Sequence[int | str]]) -> str:
    return ";".join(f"{name}:{','.join(map(str, dims))}" for name, dims in inputs.items())
