"""The page: what is always there, and one tab per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from sdopt.ui.app import App
from sdopt.ui.draw_tab import draw_tab
from sdopt.ui.jobs_panel import jobs_panel
from sdopt.ui.look_tab import look_tab
from sdopt.ui.recipe_tab import recipe_tab
from sdopt.ui.shared import Shared, texts
from sdopt.ui.source_tab import source_tab

CSS = Path(__file__).with_name("page.css").read_text("utf-8")
I18N = texts
THEME = gr.themes.Default(
    primary_hue="blue",
    font=["system-ui", "sans-serif"],  # of the system: none is fetched from anywhere
    font_mono=["ui-monospace", "monospace"],
)
POLL_SECONDS = 1.0
"""How often the page asks while a job runs; without one it does not ask."""


def build(app: App) -> gr.Blocks:
    """The page of a server."""
    page: gr.Blocks
    with gr.Blocks(title="sdopt", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(texts("lead"), elem_id="lead")
        bundle = gr.Dropdown(
            label=texts("bundle"), info=texts("bundle_info"), choices=[], elem_id="bundle"
        )
        notice = gr.HTML(elem_id="notice")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                tabs = gr.Tabs()
            with gr.Column(scale=2, min_width=320, elem_id="jobs"):
                job = gr.Dropdown(label=texts("job"), choices=[], elem_id="job")
                panel = gr.HTML(elem_id="panel")
                timer = gr.Timer(POLL_SECONDS, active=False)
                moved = gr.State(-1)
                shared = Shared(app, bundle, notice, job, panel, timer, moved)
                jobs_panel(shared, page)
        with tabs:
            for name, tab in (
                ("source_tab", source_tab),
                ("recipe_tab", recipe_tab),
                ("look_tab", look_tab),
                ("draw_tab", draw_tab),
            ):
                with gr.Tab(texts(name), id=name):
                    tab(shared, page)

        def bundles(chosen: str | None) -> Any:
            found = (one.name for one in app.workspace.bundles() if not one.error)
            names = [name for name in found if "/" not in name]  # a job's bundle is one folder
            newest = next((job.bundle for job in app.queue.jobs() if job.bundle in names), None)
            kept = chosen if chosen in names else newest or next(iter(names), None)
            return gr.Dropdown(choices=names, value=kept)

        page.load(bundles, [bundle], [bundle], show_progress="hidden")
        moved.change(bundles, [bundle], [bundle], show_progress="hidden")
    return page
