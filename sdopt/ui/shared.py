"""What every part of the page has in common: the chosen model, the job queue, and the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from sdopt.bundle import Bundle
from sdopt.errors import SdoptError, UsageError
from sdopt.ui.app import App
from sdopt.ui.inside import inside
from sdopt.ui.jobs import Call, JobView
from sdopt.ui.shown import job_html, notice_html
from sdopt.ui.strings import language_of, say, tables

texts = gr.I18n(**tables())
"""A text that the browser takes in its own language, by its key."""

Order = tuple[str, str, Sequence[Call]]
"""What a form asks for: the bundle, the job's title, and its calls."""


@dataclass(frozen=True)
class Shared:
    """The components that stand above and below the tabs.

    ``moved`` counts what happened to jobs: a part that shows their results listens to it. The
    timer runs only while there is a job, so an idle page asks the server for nothing.
    """

    app: App
    bundle: gr.Dropdown
    notice: gr.HTML
    job: gr.Dropdown
    panel: gr.HTML
    timer: gr.Timer
    moved: gr.State

    def submits(
        self, button: gr.Button, form: Callable[..., Order], inputs: Sequence[Any]
    ) -> None:
        """A press of the button queues what ``form`` makes of the inputs, or shows its error."""

        def handle(request: gr.Request, *values: Any) -> list[Any]:
            language = spoken(request)
            try:
                bundle, title, calls = form(*map(_given, inputs, values))
                job = self.app.queue.submit(bundle, title, calls)
            except SdoptError as error:
                return [notice_html("", error, language), *[gr.skip()] * 4]
            note = notice_html(say("submitted", language, title=title), language=language)
            return [note, *self.state(job, language)]

        outputs = [self.notice, self.job, self.panel, self.timer, self.moved]
        button.click(handle, list(inputs), outputs, show_progress="hidden")

    def state(self, job: str | None, language: str) -> list[Any]:
        """Updates of the job list, the panel, the timer and the counter."""
        queue = self.app.queue
        # In this order what is shown is never older than what says whether to ask again.
        changes, jobs = queue.changes(), queue.jobs()
        busy = any(not one.state.final for one in jobs)
        ids = [one.id for one in jobs]
        chosen = job if job in ids else next(iter(ids), None)
        listed = [(listing(one, language), one.id) for one in jobs]
        view = queue.job(chosen) if chosen else None
        return [
            gr.Dropdown(choices=listed, value=chosen),
            job_html(view, language),
            gr.Timer(active=busy),
            changes,
        ]

    def check(self, name: str) -> Path:
        """A path below the root.

        Raises:
            UsageError: it leads elsewhere.
        """
        return inside(self.app.workspace.root, name)

    def opened(self, bundle: str | None) -> Bundle:
        """The chosen bundle.

        Raises:
            UsageError: none is chosen.
            BundleError: it is none.
        """
        if not bundle:
            raise UsageError("no model is chosen", hint="choose one above, or export one")
        return Bundle.open(self.check(bundle))

    def finished(self, bundle: str | None, verb: str) -> JobView | None:
        """The newest job of a bundle that ended well and ends with a call of that verb."""
        for one in self.app.queue.jobs():
            if (one.bundle, str(one.state)) == (bundle, "done") and one.calls[-1].verb == verb:
                return self.app.queue.job(one.id)
        return None


def _given(component: Any, value: Any) -> Any:
    """A value of a form; a text that nobody touched comes as None."""
    return "" if value is None and isinstance(component, gr.Textbox) else value


def spoken(request: gr.Request) -> str:
    """The language of the reader's browser."""
    return language_of(request.headers.get("accept-language"))


def listing(job: JobView, language: str) -> str:
    """A job in one line."""
    return f"{job.title} ({say(str(job.state), language)}) {job.bundle} {job.id}"
