"""Adapters that ``export`` merges: which they are, whether they fit, and the passes that do it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdopt.errors import SourceError, UsageError
from sdopt.exporters.source import Exported, Source
from sdopt.passes.base import Role
from sdopt.passes.lora import Lora
from sdopt.pipeline import Pipeline, RunContext
from sdopt.reading import user_path
from sdopt.report import PassReport, Progress
from sdopt.safetensors_header import read_header

_BASES: Mapping[int, str] = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}
"""The width of the states that cross-attention reads, by which an adapter's base is known."""

_CROSS = re.compile(r"attn2[._](processor[._])?to_[kv][._](lora[._])?(lora_)?(down|A)\b.*weight")


@dataclass(frozen=True)
class Merge:
    """The adapters of one export, in the order in which they are merged."""

    passes: tuple[Lora, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str], *, in_place: bool) -> Merge:
        """Read ``FILE`` or ``FILE:scale`` each.

        Raises:
            UsageError: a scale that is no finite number, or adapters and ``in_place``.
        """
        if texts and in_place:
            raise UsageError(
                "--in-place takes no --lora",
                why="in place means that the checkpoint's own bytes are the weights",
                hint="export with -o BUNDLE, or merge later: sdopt optimize --passes lora=FILE",
            )
        return cls(tuple(map(_parse, texts)))

    def check(self, source: Source) -> None:
        """Refuse an adapter of another family than the source's; reads headers alone.

        Raises:
            SourceError: naming both.
            WeightsError: no such file, or no safetensors.
        """
        if "unet" not in source.component_names():
            return
        width = source.config("unet").get("cross_attention_dim")
        for one in self.passes:
            entries, _ = read_header(user_path(one.file))
            widths = {e.shape[1] for n, e in entries.items() if _CROSS.search(n) and e.shape[1:]}
            if widths and width not in widths:
                raise SourceError(
                    "the adapter is for another model",
                    where=one.file,
                    why=f"it was made for {_base(min(widths))}, and this is {_base(width)}",
                    hint="take the adapter for this model, or the model that it was made for",
                )

    def deciding(self, role: Role) -> list[object]:
        """What decides a component's stage beside its source: nothing without adapters."""
        pipeline = self._pipeline(role)
        return [str(pipeline), *pipeline.reads()] if pipeline.passes else []

    def apply(self, exported: Exported, progress: Progress) -> list[PassReport]:
        """Merge into one component; its weights are then computed while they are written."""
        context = RunContext(exported.name, exported.role, exported.config, progress=progress)
        return self._pipeline(exported.role).run(exported.model, context)

    def _pipeline(self, role: Role) -> Pipeline:
        return Pipeline(self.passes).for_role(role)


def _parse(text: str) -> Lora:
    file, colon, scale = text.rpartition(":")
    if not colon or user_path(text).is_file():
        return Lora(text)
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(
            f"{scale!r} is no scale of an adapter",
            where=f"--lora {text}",
            hint="FILE, or FILE:0.8",
        )
    return Lora(file, value)


def _base(width: object) -> str:
    name = _BASES.get(width) if isinstance(width, int) else None
    text = f"a model whose cross-attention reads states of {width}"
    return f"{name} (states of {width})" if name else text
