"""The report of a bundle: what passes did and left, what that cost, how far off it is, images."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from sdopt.ui import requests
from sdopt.ui.shared import Order, Shared, spoken, texts
from sdopt.ui.strings import say


def look_tab(shared: Shared, page: gr.Blocks) -> None:
    """The tab and what its controls do."""
    with gr.Row():
        stages = gr.Dropdown(
            label=texts("stages"), info=texts("stages_info"), choices=[], multiselect=True
        )
        components = gr.Dropdown(
            label=texts("components"), info=texts("stages_info"), choices=[], multiselect=True
        )
    with gr.Row():
        compare = gr.Checkbox(label=texts("with_compare"), value=False, elem_id="with-compare")
        images = gr.Checkbox(label=texts("with_images"), value=False)
    with gr.Accordion(texts("images"), open=False):
        prompts = gr.Textbox(label=texts("prompt"), info=texts("prompt_info"), lines=2)
        with gr.Row():
            steps = gr.Number(label=texts("steps"), value=8, precision=0, minimum=1)
            guidance = gr.Number(label=texts("guidance"), value=2.0)
            seed = gr.Number(label=texts("seed"), value=0, precision=0, minimum=0)
    show = gr.Button(texts("show"), variant="primary", elem_id="show-report")
    frame = gr.HTML(elem_id="report")

    def reported(bundle: str | None, *values: Any) -> Order:
        name = shared.opened(bundle).path.name
        stages, components, compare, images, prompts, steps, guidance, seed = values
        drawing = requests.Drawing(prompts, steps=steps, guidance=guidance, seed=seed)
        call = requests.report(
            name,
            stages=stages or [],
            components=components or [],
            compare=compare,
            images=images,
            drawing=drawing,
        )
        return name, "report", [call]

    form = [stages, components, compare, images, prompts, steps, guidance, seed]
    shared.submits(show, reported, [shared.bundle, *form])

    def offered(bundle: str | None) -> list[Any]:
        if not bundle:
            return [gr.Dropdown(choices=[], value=[]) for _ in range(2)]
        opened = shared.opened(bundle)
        names = dict.fromkeys(s for name in opened.components for s in opened.stages(name))
        return [gr.Dropdown(choices=list(names)), gr.Dropdown(choices=list(opened.components))]

    def framed(request: gr.Request, bundle: str | None) -> str:
        language = spoken(request)
        job = shared.finished(bundle, "report")
        if job is None:
            return f'<p class="quiet">{say("no_report", language)}</p>'
        page = shared.check(job.results[-1]["file"]).read_text("utf-8")
        # The page runs its own script to draw charts; the sandbox gives it no access to this one.
        return (
            f'<iframe title="{say("report", language)}" sandbox="allow-scripts" class="report" '
            f'srcdoc="{html.escape(page)}"></iframe>'
        )

    quiet: Any = {"show_progress": "hidden"}
    for event in (shared.bundle.change, shared.moved.change):
        event(offered, [shared.bundle], [stages, components], **quiet)
        event(framed, [shared.bundle], [frame], **quiet)
