"""Images from a prompt by whatever of a bundle runs here, side by side with another stage's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from sdopt import artifacts, registry
from sdopt.errors import MissingDependencyError, UsageError
from sdopt.runtime.schedulers import SCHEDULERS
from sdopt.ui import requests
from sdopt.ui.jobs import JobView
from sdopt.ui.shared import Order, Shared, texts

Runs = tuple[Any, str]


def draw_tab(shared: Shared, page: gr.Blocks) -> None:
    """The tab and what its controls do."""
    prompt = gr.Textbox(
        label=texts("prompt"), info=texts("prompt_info"), lines=2, elem_id="prompt"
    )
    negative = gr.Textbox(label=texts("negative"))
    with gr.Row():
        runs = gr.Dropdown(
            label=texts("runs_on"), info=texts("runs_on_info"), choices=_newest(), value=""
        )
        against = gr.Dropdown(
            label=texts("against"),
            info=texts("against_info"),
            choices=[(texts("none"), "")],
            value="",
            elem_id="against",
        )
    with gr.Row():
        steps = gr.Number(label=texts("steps"), value=25, precision=0, minimum=1)
        guidance = gr.Number(label=texts("guidance"), value=7.5)
        seed = gr.Number(label=texts("seed"), value=0, precision=0, minimum=0)
        count = gr.Number(label=texts("count"), value=1, precision=0, minimum=1)
    with gr.Row():
        size: Any = {"info": texts("size_info"), "precision": 0, "value": None}
        height = gr.Number(label=texts("height"), **size)
        width = gr.Number(label=texts("width"), **size)
        scheduler = gr.Dropdown(
            label=texts("scheduler"),
            choices=[(texts("own_scheduler"), ""), *((one, one) for one in SCHEDULERS)],
            value="",
        )
    with gr.Accordion(texts("extras"), open=False):
        with gr.Row():
            adapters = gr.Dropdown(label=texts("loras"), choices=[], multiselect=True)
            scales = gr.Textbox(label=texts("scales"), info=texts("scales_info"))
        control = gr.Image(label=texts("control"), type="filepath", sources=["upload"], height=160)
    with gr.Tabs():
        with gr.Tab(texts("text_to_image")):
            draw = gr.Button(texts("draw"), variant="primary", elem_id="draw")
        with gr.Tab(texts("image_to_image")):
            with gr.Row():
                image = gr.Image(
                    label=texts("start_image"), type="filepath", sources=["upload"], height=240,
                    elem_id="start-image",
                )  # fmt: skip
                mask = gr.Image(
                    label=texts("mask"), type="filepath", sources=["upload"], height=240
                )
            strength = gr.Slider(
                0.05, 1, 0.8, label=texts("strength"), info=texts("strength_info")
            )
            redraw = gr.Button(texts("draw"), variant="primary", elem_id="redraw")
    gallery = gr.Gallery(
        label=texts("images"), columns=4, height="auto", interactive=False, elem_id="images"
    )
    pair = gr.Number(label=texts("pair"), value=1, precision=0, minimum=1)
    label: Any = texts("ab")  # its annotation forgets what the others take
    slider = gr.ImageSlider(label=label, interactive=False, elem_id="ab")

    def drawn(start: bool, *values: Any) -> Order:
        bundle, runs, against, adapters, scales, control, image, mask, strength, *rest = values
        name = shared.opened(bundle).path.name
        keep = shared.app.workspace.keep_picture
        if start and not image:
            raise UsageError("there is no start image", hint="upload one")
        prompt, negative, steps, guidance, seed, count, height, width, scheduler = rest
        drawing = requests.Drawing(
            prompt,
            negative=negative,
            steps=steps,
            guidance=guidance,
            seed=seed,
            count=count,
            height=height,
            width=width,
            scheduler=scheduler,
            adapters=requests.loras(shared.app.workspace, adapters or [], scales),
            image=keep(Path(image)) if start else "",
            mask=keep(Path(mask)) if start and mask else "",
            strength=strength if start else None,
            control=keep(Path(control)) if control else "",
        )
        calls = [drawing.call(shared.app.workspace, name, runs)]
        if against:
            calls.append(drawing.call(shared.app.workspace, name, against))
        return name, f"draw {drawing.prompts.splitlines()[0][:40]}", calls

    def texts_only(*values: Any) -> Order:
        return drawn(False, *values)

    def from_image(*values: Any) -> Order:
        return drawn(True, *values)

    form = [shared.bundle, runs, against, adapters, scales, control, image, mask, strength]
    form += [prompt, negative, steps, guidance, seed, count, height, width, scheduler]
    shared.submits(draw, texts_only, form)
    shared.submits(redraw, from_image, form)

    def offered(bundle: str | None, runs: str, against: str) -> list[Any]:
        found = _runs(shared, bundle) if bundle else []
        known = ["", *(value for _, value in found)]
        files = [one.name for one in shared.app.workspace.adapters()]
        return [
            gr.Dropdown(choices=[*_newest(), *found], value=runs if runs in known else ""),
            gr.Dropdown(
                choices=[(texts("none"), ""), *found], value=against if against in known else ""
            ),
            gr.Dropdown(choices=files),
        ]

    def shown(bundle: str | None, pair: float | None) -> list[Any]:
        job = shared.finished(bundle, "run")
        images = _images(shared, job) if job else []
        sides = len(job.calls) if job else 1
        a, b = (images[: len(images) // 2], images[len(images) // 2 :]) if sides == 2 else ([], [])
        at = min(max(int(pair or 1), 1), len(a)) - 1 if a else 0
        compared = (a[at][0], b[at][0]) if a and len(a) == len(b) else None
        return [images, gr.ImageSlider(value=compared)]

    quiet: Any = {"show_progress": "hidden"}
    for event in (shared.bundle.change, shared.moved.change):
        event(offered, [shared.bundle, runs, against], [runs, against, adapters], **quiet)
        event(shown, [shared.bundle, pair], [gallery, slider], **quiet)
    pair.change(shown, [shared.bundle, pair], [gallery, slider], **quiet)


def _newest() -> list[Runs]:
    return [(texts("newest"), "")]


def _runs(shared: Shared, bundle: str) -> list[Runs]:
    """What of a bundle can run here: every stage by ONNX Runtime, and compiled artifacts."""
    opened = shared.opened(bundle)
    stages = dict.fromkeys(stage for name in opened.components for stage in opened.stages(name))
    found: list[Runs] = [(stage, f"stage:{stage}") for stage in stages]
    specs = dict.fromkeys(
        str(one.facts.get("target", "")) for _, one in artifacts.under(opened.path)
    )
    found += [(spec, f"target:{spec}") for spec in specs if spec and _opens(spec)]
    return found


def _opens(spec: str) -> bool:
    try:
        registry.make("targets", spec).check_available()
    except MissingDependencyError:
        return False
    return True


def _images(shared: Shared, job: JobView) -> list[tuple[str, str]]:
    """The images of a job with what made each."""
    found = []
    for call, result in zip(job.calls, job.results, strict=False):
        what = call.arguments.get("stage") or call.arguments.get("target") or ""
        for index, name in enumerate(result.get("images", [])):
            seed = int(call.arguments["seed"]) + index
            path = shared.app.workspace.root / name
            found.append((str(path), f"{what} seed {seed}".strip()))
    return found
