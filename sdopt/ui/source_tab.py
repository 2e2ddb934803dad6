"""Step 1: where the checkpoint comes from, and its export to a bundle."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from sdopt.errors import SdoptError, UsageError
from sdopt.ui import requests
from sdopt.ui.listing import Source
from sdopt.ui.shared import Order, Shared, spoken, texts
from sdopt.ui.shown import notice_html
from sdopt.ui.strings import say
from sdopt.ui.workspace import UPLOADS
from sdopt.units import size

SUPPLIED = ("controlnet", "vae", "text_encoder", "text_encoder_2", "tokenizer")


def source_tab(shared: Shared, page: gr.Blocks) -> None:
    """The tab and what its controls do."""
    with gr.Tabs():
        with gr.Tab(texts("from_root")):
            source = gr.Dropdown(
                label=texts("source"), info=texts("source_info"), choices=[], elem_id="source"
            )
        with gr.Tab(texts("from_upload")):
            upload = gr.File(
                label=texts("upload"), file_types=[".safetensors"], height=160, elem_id="upload"
            )
        with gr.Tab(texts("from_url")):
            url = gr.Textbox(label=texts("url"), info=texts("url_info"), elem_id="url")
            with gr.Row():
                sha256 = gr.Textbox(label=texts("sha256"), placeholder=texts("optional"))
                limit = gr.Number(label=texts("limit"), value=20, minimum=0.001)
            fetch = gr.Button(texts("fetch"))
    about = gr.HTML(elem_id="about-source")
    with gr.Accordion(texts("parts"), open=False):
        with gr.Row():
            adapters = gr.Dropdown(label=texts("loras"), choices=[], multiselect=True)
            scales = gr.Textbox(label=texts("scales"), info=texts("scales_info"))
        with gr.Row():
            parts = [
                gr.Dropdown(label=texts(name), choices=_named([""]), value="") for name in SUPPLIED
            ]
    with gr.Row():
        name = gr.Textbox(label=texts("name"), info=texts("name_info"), elem_id="name")
        dtype = gr.Dropdown(
            label=texts("dtype"),
            choices=[(texts("as_is"), ""), *((one, one) for one in ("fp32", "fp16", "bf16"))],
            value="",
        )
    export = gr.Button(texts("export"), variant="primary")

    choices = [source, adapters, *parts]

    def offered(chosen: str | None) -> list[Any]:
        return _offered(shared, chosen)

    def told(request: gr.Request, chosen: str | None) -> list[Any]:
        workspace = shared.app.workspace
        found = next((one for one in workspace.sources() if one.name == chosen), None)
        if found is None:
            return ["", ""]
        stem = Path(found.name).stem if found.kind == "file" else Path(found.name).name
        return [_about(found, spoken(request)), workspace.fresh_name(stem)]

    def taken(request: gr.Request, path: str | None) -> list[Any]:
        language = spoken(request)
        if not path:
            return [gr.skip() for _ in [shared.notice, *choices]]
        try:
            kept = shared.app.workspace.take(Path(path), Path(path).name)
        except SdoptError as error:
            return [notice_html("", error, language), *[gr.skip() for _ in choices]]
        found = shared.app.workspace.relative(kept)
        note = notice_html(say("taken", language, name=found), language=language)
        return [note, *_offered(shared, found)]

    page.load(offered, [source], choices)
    shared.moved.change(offered, [source], choices, show_progress="hidden")
    upload.upload(taken, [upload], [shared.notice, *choices])
    source.change(told, [source], [about, name], show_progress="hidden")

    def fetched(url: str, sha256: str, limit: float) -> Order:
        settings = shared.app.settings
        call = requests.fetch(
            url,
            UPLOADS,
            limit_bytes=min(int(limit * requests.GB), settings.max_upload_bytes),
            sha256=sha256,
            allow_private=settings.allow_private_urls,
        )
        return UPLOADS, f"fetch {url.split('?')[0].rpartition('/')[2]}", [call]

    def exported(
        source: str | None, name: str, dtype: str, adapters: list[str], scales: str, *given: str
    ) -> Order:
        if not source:
            raise UsageError("no checkpoint is chosen", hint="choose one, or upload one")
        bundle = shared.app.workspace.new_bundle(name).name
        supplied = {part: path for part, path in zip(SUPPLIED, given, strict=True) if path}
        merged = requests.loras(shared.app.workspace, adapters or [], scales)
        call = requests.export(
            shared.app.workspace,
            source,
            bundle,
            dtype=dtype,
            adapters=merged,
            supplied=supplied,
        )
        return bundle, f"export {Path(source).name}", [call]

    shared.submits(fetch, fetched, [url, sha256, limit])
    shared.submits(export, exported, [source, name, dtype, adapters, scales, *parts])


def _offered(shared: Shared, chosen: str | None) -> list[Any]:
    """The choices of the dropdowns as they are on disk now."""
    workspace = shared.app.workspace
    found = workspace.sources()
    names = [one.name for one in found]
    value = chosen if chosen in names else next(iter(names), None)
    others = ["", *names]
    return [
        gr.Dropdown(choices=[(_line(one), one.name) for one in found], value=value),
        gr.Dropdown(choices=[one.name for one in workspace.adapters()]),
        *(gr.Dropdown(choices=_named(others)) for _ in SUPPLIED),
    ]


def _named(names: Sequence[str]) -> list[tuple[Any, str]]:
    return [(name or texts("none"), name) for name in names]


def _line(one: Source) -> str:
    return f"{one.name} ({one.family or '?'}, {size(one.size_bytes)})"


def _about(one: Source, language: str) -> str:
    """Family, size and what is missing; or why it cannot be exported."""
    if one.error is not None:
        return notice_html("", SdoptError(one.error, where=one.name), language)
    missing = ", ".join(one.missing)
    lacks = say("lacks", language, parts=missing) if missing else say("nothing_missing", language)
    rows = (
        ("family", one.family or "?"),
        ("size", size(one.size_bytes)),
        ("components", ", ".join(one.components)),
    )
    cells = "".join(
        f"<dt>{say(key, language)}</dt><dd>{html.escape(text)}</dd>" for key, text in rows
    )
    return f'<dl class="facts">{cells}<dt></dt><dd>{html.escape(lacks)}</dd></dl>'
