"""The calls of a job, carried out: files checked, ``sdopt.api`` called, results as JSON."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt import api, datafile
from sdopt.errors import UsageError
from sdopt.report import Progress, Report, part
from sdopt.requirements import enforce
from sdopt.spec import suggest
from sdopt.ui.inside import inside
from sdopt.ui.jobfolder import JobFolder
from sdopt.ui.records import Call

Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One call and where it is carried out; the current folder is the root.

    Attributes:
        root: what all paths are relative to and stay in.
        job: the folder of the job.
        call: the verb and its arguments.
        tell: is told the call's progress.
        keep: writes a result before the call is over.
    """

    root: Path
    job: JobFolder
    call: Call
    tell: Progress
    keep: Callable[[Result], None]

    def path(self, name: str) -> Path:
        """A path of a page, relative to the root.

        Raises:
            UsageError: it leads out.
        """
        return inside(self.root, name).relative_to(self.root)

    def own(self, name: str) -> Path:
        """A path in the job's own folder, relative to the root."""
        return self.job.path.relative_to(self.root) / name

    def options(
        self,
        function: Callable[..., Any],
        *,
        files: Sequence[str] = (),
        more: Mapping[str, Any] | None = None,
        hidden: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The arguments, each one that ``function`` has; ``bundle`` is the job's unless given.

        Args:
            function: whose arguments they are.
            files: those of them that are paths.
            more: arguments beside those, with what they are where they are left out.
            hidden: those that no page may give.

        Raises:
            UsageError: one that is unknown or missing, or a path that leads out.
        """
        verb, given = self.call.verb, dict(self.call.arguments)
        parameters = dict(inspect.signature(function).parameters)
        for name in ("progress", *hidden):
            parameters.pop(name, None)
        if "bundle" in parameters:
            given.setdefault("bundle", self.job.bundle)
        found = {**(more or {})}
        names = [*parameters, *found]
        for name, value in given.items():
            if name not in names:
                raise UsageError(
                    f"{verb} takes no {name!r}",
                    hint=suggest(name, names) or f"it takes {', '.join(names)}",
                )
            is_path = name in ("bundle", *files) and value is not None
            found[name] = self.path(value) if is_path else value
        for name, one in parameters.items():
            if one.default is one.empty and one.kind != one.VAR_KEYWORD and name not in found:
                raise UsageError(f"{verb} needs {name!r}")
        return found

    def adapter(self, text: str) -> str:
        """``FILE`` or ``FILE:scale`` as it is, the file checked."""
        name, colon, _ = text.rpartition(":")
        self.path(text)
        self.path(name if colon else text)
        return text

    def passes(self, text: str) -> str:
        """A spec as it is, or the path of a recipe, which is checked."""
        return str(self.path(text)) if text.endswith((".recipe", ".txt")) else text


def perform(work: Work) -> Result:
    """Carry out a call.

    Raises:
        UsageError: an argument that the verb does not have, or a path that leads out.
        SdoptError: as the verb raises it.
    """
    return _VERBS[work.call.verb](work)


def _fetch(work: Work) -> Result:
    fetch = importlib.import_module("sdopt.ui.fetching").fetch
    given = work.options(fetch, files=("folder",), hidden=("pause",))
    return {"file": _relative(work, fetch(progress=work.tell, **given))}


def _export(work: Work) -> Result:
    # What is no folder here is a name on the Hub, which has the form of such a path.
    given = work.options(api.export, files=("source", "output"))
    if not given.get("in_place"):
        given.setdefault("output", work.path(work.job.bundle))
    supplied = (given.get("supplied") or {}).items()
    given["supplied"] = {name: str(work.path(place)) for name, place in supplied}
    given["lora"] = [work.adapter(one) for one in given.get("lora") or ()]
    return api.export(progress=work.tell, **given).to_json()


def _optimize(work: Work) -> Result:
    given = work.options(api.optimize)
    given["passes"] = work.passes(given["passes"])
    return _enforced(work, api.optimize(progress=work.tell, **given))


def _build(work: Work) -> Result:
    given = work.options(api.build)
    for name in {"batch"} & given.keys():
        given[name] = tuple(given[name])
    for name in {"dims"} & given.keys():
        given[name] = {axis: tuple(extent) for axis, extent in (given[name] or {}).items()}
    return _enforced(work, api.build(progress=work.tell, **given))


def _run(work: Work) -> Result:
    from sdopt.runtime.generate import generate, save_png

    given = work.options(generate, files=("image", "mask", "control"))
    given["loras"] = [_adapter(work, one) for one in given.get("loras") or ()]
    work.job.images.mkdir(exist_ok=True)
    result: Result = {"images": [], "facts": []}
    first = len(list(work.job.images.glob("*.png")))  # of calls before this one
    for index, one in enumerate(api.run(progress=work.tell, **given), first):
        name = f"{index:04d}.png"
        save_png(one, work.job.images / name)
        result["images"].append(str(work.own("images") / name))
        result["facts"].append(one.text())
        work.keep(result)
    return result


def _compare(work: Work) -> Result:
    from sdopt.compare import compare
    from sdopt.compare.layer_report import page

    # Hooks are Python that would be run.
    given = work.options(compare, files=("recorded",), more={"layers": False}, hidden=("hooks",))
    layers = given.pop("layers")
    given |= {name: _side(work, given[name]) for name in ("a", "b")}
    tell = part(work.tell, 0, 1 + layers)
    result = api.compare(progress=tell, **given).to_json()
    if not layers:
        return result
    work.keep(result)
    inside_ = api.compare_layers(progress=part(work.tell, 1, 2, "layers"), **given)
    folder = work.own("layers")
    folder.mkdir(exist_ok=True)
    page(inside_).write(folder / "layers.html")
    images = [folder / f"{one.component}.png" for one in inside_]
    for one, path in zip(inside_, images, strict=True):
        datafile.write_bytes(path, one.chart().png())
    return {
        **result,
        "layers": [one.to_json() for one in inside_],
        "images": [str(path) for path in images],
        "file": str(folder / "layers.html"),
    }


def _pack(work: Work) -> Result:
    given = work.options(api.pack, files=("output",))
    report = api.pack(progress=work.tell, **given)
    return {**report.to_json(), "file": str(given["output"])}


def _bench(work: Work) -> Result:
    from sdopt.bench import bench, text

    given = work.options(bench, files=("recorded",), more={"html": False}, hidden=("command",))
    html = given.pop("html")
    report = api.bench(progress=work.tell, **given)
    result = report.to_json()
    if html:
        result["file"] = str(work.own("bench.html"))
        text.page(report).write(work.own("bench.html"))
    return result


def _report(work: Work) -> Result:
    from sdopt.reporting import Options
    from sdopt.reporting.samples import Drawing

    more: dict[str, Any] = {one.name: None for one in dataclasses.fields(Options)}
    more["output"] = work.own("report.html")
    files = ("output", "benchmark", "evaluation")
    given = work.options(api.report, files=files, more=more, hidden=("options",))
    bundle, output = given.pop("bundle"), given.pop("output")
    drawing = dict(given.pop("drawing") or {})
    if "prompts" in drawing:
        drawing["prompts"] = tuple(drawing["prompts"])
    chosen = {name: value for name, value in given.items() if value is not None}
    options = Options(**chosen, drawing=Drawing(**drawing))
    made = api.report(bundle, output, options, progress=work.tell)
    return {**dataclasses.asdict(made), "file": _relative(work, made.file)}


_VERBS: Mapping[str, Callable[[Work], Result]] = {
    "fetch": _fetch,
    "export": _export,
    "optimize": _optimize,
    "build": _build,
    "run": _run,
    "compare": _compare,
    "pack": _pack,
    "bench": _bench,
    "report": _report,
}


def _enforced(work: Work, report: Report) -> Result:
    """The report, unless a requirement was not met: what comes after counts on the stage."""
    work.keep(report.to_json())
    enforce(report)
    return report.to_json()


def _adapter(work: Work, one: Any) -> Any:
    if isinstance(one, str):
        return work.adapter(one)
    file, scale = one
    return (work.path(file), scale)


def _side(work: Work, text: str) -> str:
    """``BUNDLE``, ``BUNDLE@STAGE`` or a file, relative to the root."""
    if work.path(text).exists():
        return str(work.path(text))
    head, at, stage = text.rpartition("@")
    return f"{work.path(head)}{at}{stage}" if at else str(work.path(text))


def _relative(work: Work, path: Path) -> str:
    return str((work.root / path).relative_to(work.root))
