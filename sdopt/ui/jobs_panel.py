"""The job that runs or ran: progress, cancel, log, and what there is to download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from sdopt.errors import SdoptError, UsageError
from sdopt.ui import packages
from sdopt.ui.shared import Shared, spoken, texts
from sdopt.ui.shown import link_html, notice_html
from sdopt.ui.strings import say


def jobs_panel(shared: Shared, page: gr.Blocks) -> None:
    """The buttons below the panel and what they do."""
    with gr.Row():
        cancel = gr.Button(texts("cancel"), variant="stop", size="sm", elem_id="cancel")
        forget = gr.Button(texts("forget"), size="sm")
        refresh = gr.Button(texts("refresh"), size="sm")
    with gr.Row():
        package = gr.Dropdown(label=texts("package"), info=texts("package_info"), choices=[])
        make = gr.Button(texts("zip"), elem_id="zip")
    link = gr.HTML(elem_id="download")

    outputs = [shared.notice, shared.job, shared.panel, shared.timer, shared.moved]

    def acting(act: Callable[[str], None]) -> Callable[..., list[Any]]:
        def handle(request: gr.Request, job: str | None) -> list[Any]:
            language = spoken(request)
            try:
                if job:
                    act(job)
            except SdoptError as error:
                return [notice_html("", error, language), *[gr.skip()] * 4]
            return ["", *shared.state(job, language)]

        # Gradio asks the function for its types to know that it wants the request.
        handle.__annotations__ = {"request": gr.Request, "job": str}
        return handle

    def tick(request: gr.Request, job: str | None, seen: int) -> list[Any]:
        queue = shared.app.queue
        if queue.changes() == seen and queue.busy():
            return [gr.skip()] * 4
        return shared.state(job, spoken(request))

    def looked(request: gr.Request, job: str | None) -> list[Any]:
        return shared.state(job, spoken(request))

    def offered(bundle: str | None) -> Any:
        names = packages.offered(shared.opened(bundle)) if bundle else []
        return gr.Dropdown(choices=names, value=next(iter(names), None))

    def zipped(request: gr.Request, bundle: str | None, name: str | None) -> list[Any]:
        language = spoken(request)
        try:
            if not name:
                raise UsageError("nothing to download yet", hint="build something first")
            path = packages.zipped(shared.app.workspace, shared.opened(bundle), name)
        except SdoptError as error:
            return [notice_html("", error, language), ""]
        return ["", link_html(path, say("download", language))]

    quiet: Any = {"show_progress": "hidden"}
    shared.timer.tick(tick, [shared.job, shared.moved], outputs[1:], **quiet)
    shared.job.input(looked, [shared.job], outputs[1:], **quiet)
    refresh.click(looked, [shared.job], outputs[1:], **quiet)
    page.load(looked, [shared.job], outputs[1:], **quiet)
    cancel.click(acting(shared.app.queue.cancel), [shared.job], outputs, **quiet)
    forget.click(acting(shared.app.queue.forget), [shared.job], outputs, **quiet)
    shared.moved.change(offered, [shared.bundle], [package], **quiet)
    shared.bundle.change(offered, [shared.bundle], [package], **quiet)
    make.click(zipped, [shared.bundle, package], [shared.notice, link])
