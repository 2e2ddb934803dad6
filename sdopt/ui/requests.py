"""What the page's forms ask for, checked and as calls of ``sdopt.api``: nothing runs here.

Whatever a form says may come from anybody who can reach the page, so names of files and specs go
through ``sdopt.ui.specs`` and the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdopt.errors import UsageError
from sdopt.shapes import parse_batch, parse_sizes
from sdopt.ui import specs
from sdopt.ui.jobs import Call
from sdopt.ui.workspace import Workspace

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
GB = 1_000_000_000


def target(workspace: Workspace, text: str, options: str = "", precision: str = "") -> str:
    """A target's spec with more options and a precision, checked for the page.

    Raises:
        SdoptError: see ``sdopt.ui.specs.target``.
    """
    more = [options.strip().strip(":")] * bool(options.strip())
    return specs.target(
        workspace, ":".join([text, *more, *[f"dtype={precision}"] * bool(precision)])
    )


def loras(workspace: Workspace, names: Sequence[str], scales: str) -> list[str]:
    """Adapters with their scales, as ``FILE:scale``.

    Raises:
        UsageError: a scale that is no number, or more of them than adapters.
        PathError: a file that is not below the root.
    """
    given = [text.strip() for text in scales.split(",")] if scales.strip() else []
    if len(given) > len(names):
        raise UsageError(f"{len(given)} scales for {len(names)} LoRAs")
    found = []
    for index, name in enumerate(names):
        text = given[index] if index < len(given) and given[index] else "1"
        try:
            scale = float(text)
        except ValueError:
            raise UsageError(f"the scale {text!r} is no number", where=name) from None
        found.append(specs.adapter(workspace, name, scale))
    return found


def export(
    workspace: Workspace,
    source: str,
    bundle: str,
    *,
    dtype: str = "",
    adapters: Sequence[str] = (),
    supplied: dict[str, str] | None = None,
) -> Call:
    """Export a checkpoint below the root to a bundle there.

    Raises:
        SdoptError: a path that is not below the root.
    """
    given = {name: path for name, path in (supplied or {}).items() if path}
    for path in (source, *given.values()):
        workspace.resolve(path)
    arguments: dict[str, Any] = {"source": source, "output": bundle, "lora": list(adapters)}
    if dtype:
        arguments["dtype"] = dtype
    if given:
        arguments["supplied"] = given
    return Call("export", arguments)


def optimize(
    workspace: Workspace,
    bundle: str,
    text: str,
    *,
    stage: str,
    source: str = "",
    dry_run: bool = False,
) -> Call:
    """Run a recipe.

    Raises:
        SdoptError: see ``sdopt.ui.specs.passes``.
    """
    if not text.strip():
        raise UsageError("the recipe is empty", hint="choose a pass")
    passes = specs.passes(workspace, text)
    arguments: dict[str, Any] = {"bundle": bundle, "passes": passes, "stage": stage}
    if source:
        arguments["source"] = source
    return Call("optimize", {**arguments, "dry_run": dry_run})


def build(
    workspace: Workspace,
    bundle: str,
    targets: Sequence[str],
    *,
    options: str = "",
    precision: str = "",
    source: str = "",
    shapes: str = "",
    batch: str = "1",
    emit_only: bool = False,
) -> Call:
    """Build a stage for targets.

    Raises:
        SdoptError: a target, a size or a batch that cannot be.
    """
    if shapes.strip():
        parse_sizes(shapes, multiple=1)
    arguments: dict[str, Any] = {
        "bundle": bundle,
        "targets": [target(workspace, one, options, precision) for one in targets],
        "shapes": shapes.strip(),
        "batch": list(parse_batch(batch or "1")),
        "emit_only": emit_only,
    }
    return Call("build", {**arguments, "source": source} if source else arguments)


def fetch(
    url: str, folder: str, *, limit_bytes: int, sha256: str = "", allow_private: bool = False
) -> Call:
    """Download a file to a folder below the root.

    Raises:
        UsageError: there is no URL.
    """
    if not url.strip():
        raise UsageError("there is no URL", hint="https://...")
    arguments: dict[str, Any] = {
        "url": url.strip(),
        "folder": folder,
        "limit_bytes": limit_bytes,
        "allow_private": allow_private,
    }
    if sha256.strip():
        arguments["sha256"] = sha256.strip().lower()
    return Call("fetch", arguments)


@dataclass(frozen=True)
class Drawing:
    """What the page draws; an empty text and None are the model's own."""

    prompts: str
    negative: str = ""
    steps: int = 25
    guidance: float = 7.5
    seed: int = 0
    count: int = 1
    height: int | None = None
    width: int | None = None
    scheduler: str = ""
    adapters: Sequence[str] = ()
    image: str = ""
    strength: float | None = None
    mask: str = ""
    control: str = ""

    def call(self, workspace: Workspace, bundle: str, runs: str) -> Call:
        """Draw by ``runs``: empty, ``stage:NAME`` or ``target:SPEC``.

        Raises:
            UsageError: no prompt, or a start image without its file.
        """
        prompts = [line.strip() for line in self.prompts.splitlines() if line.strip()]
        if not prompts:
            raise UsageError("what to draw?", hint="write a prompt")
        kind, _, name = runs.partition(":")
        chosen: dict[str, Any] = {}
        if kind == "stage":
            chosen["stage"] = name
        elif kind == "target":
            chosen["target"] = target(workspace, name)
        arguments = {
            "bundle": bundle,
            "prompts": prompts,
            "negative": self.negative,
            "steps": int(self.steps),
            "guidance": float(self.guidance),
            "seed": int(self.seed),
            "count": int(self.count),
            "height": int(self.height) if self.height else None,
            "width": int(self.width) if self.width else None,
            "scheduler": self.scheduler or None,
            "loras": list(self.adapters),
        }
        given = {word: getattr(self, word) for word in ("image", "mask", "control")}
        arguments |= {word: path for word, path in given.items() if path}
        if self.image:
            arguments["strength"] = self.strength
        return Call("run", {**arguments, **chosen})


def report(
    bundle: str,
    *,
    stages: Sequence[str],
    components: Sequence[str],
    compare: bool,
    images: bool,
    drawing: Drawing,
) -> Call:
    """Write the report of a bundle."""
    prompts = [line.strip() for line in drawing.prompts.splitlines() if line.strip()]
    arguments: dict[str, Any] = {
        "bundle": bundle,
        "stages": list(stages) or None,
        "components": list(components) or None,
        "compare": compare,
        "images": images,
        "drawing": {
            **({"prompts": prompts} if prompts else {}),
            "steps": int(drawing.steps),
            "guidance": float(drawing.guidance),
            "seed": int(drawing.seed),
        },
    }
    return Call("report", arguments)
