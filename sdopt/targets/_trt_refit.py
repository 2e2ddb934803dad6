"""Other weights for an engine of TensorRT or TensorRT-RTX that was built with ``refit=true``.

Written against the documented API of both (``Refitter``); as the rest of running, it is tested
with the library substituted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sdopt import modelfile
from sdopt.errors import BuildError, UsageError
from sdopt.targets._trt_build import Log

_TYPES = {
    ir.DataType.FLOAT: "FLOAT",
    ir.DataType.FLOAT16: "HALF",
    ir.DataType.BFLOAT16: "BF16",
}


def refit(
    trt: Any,
    logger: Any,
    engine: Any,
    weights: Mapping[str, ir.TensorProtocol],
    graph: Path,
    log: Log,
) -> None:
    """Put ``weights``, by the names of the graph's initializers, into an engine.

    Where the library has combined weights with others it wants those again: they come from
    ``graph``, the lowered ONNX file that the engine was built from.

    Raises:
        UsageError: the engine was not built to be refitted.
        BuildError: it knows no weight of a name, wants one that the graph does not have, or
            refuses.
    """
    if not engine.refittable:
        raise UsageError(
            "this engine's weights are fixed",
            where=str(graph),
            why="it was built without refit, and adapters change its weights",
            hint="build it again to be refitted: sdopt build --target TARGET:refit=true",
        )
    refitter = trt.Refitter(engine, logger)
    known = set(refitter.get_all_weights())
    if strange := sorted(weights.keys() - known):
        raise BuildError(
            f"the engine has no weight of the name {strange[0]}",
            where=str(graph),
            why=f"an adapter changes {len(weights)} weights, and {len(strange)} of them are not "
            f"among the {len(known)} that the library can replace",
            hint="merge the adapter and build that: "
            "sdopt optimize --from model --passes lora=FILE,...",
        )
    kept: list[np.ndarray] = []
    for name, tensor in weights.items():
        _set(trt, refitter, name, tensor, kept, log)
    if missing := refitter.get_missing_weights():
        values = {v.name: v.const_value for v in modelfile.initializers(modelfile.load(graph))}
        for name in missing:
            if (stored := values.get(name)) is None:
                raise BuildError(
                    f"the engine wants the weight {name or '(without a name)'} as well",
                    where=str(graph),
                    why="it was combined with one that an adapter changes, and the graph has none",
                )
            _set(trt, refitter, name, stored, kept, log)
    if not refitter.refit_cuda_engine():
        raise BuildError(
            "the engine refuses its new weights", where=str(graph), why=log.errors() or None
        )


def _set(
    trt: Any,
    refitter: Any,
    name: str,
    tensor: ir.TensorProtocol,
    kept: list[np.ndarray],
    log: Log,
) -> None:
    """Hand one weight over; the library reads it at the end, until when ``kept`` holds it."""
    kind = _TYPES.get(tensor.dtype)
    if kind is None:
        raise BuildError(f"{name} is of the type {tensor.dtype}, which cannot be refitted")
    array = np.ascontiguousarray(tensor.numpy())
    kept.append(array)
    values = trt.Weights(getattr(trt.DataType, kind), array.ctypes.data, array.size)
    if not refitter.set_named_weights(name, values):
        raise BuildError(
            f"the engine refuses the new weight {name}",
            why=log.errors() or f"it is {tensor.dtype} of {array.size} numbers",
        )
