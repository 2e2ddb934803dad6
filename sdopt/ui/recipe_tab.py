"""Step 2: which passes, for which targets, in which sizes."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

from sdopt import registry
from sdopt.bundle import OPTIMIZED, RAW
from sdopt.errors import MissingDependencyError, SdoptError, UsageError
from sdopt.ui import recipes, requests, specs
from sdopt.ui.shared import Order, Shared, spoken, texts
from sdopt.ui.shown import notice_html


def recipe_tab(shared: Shared, page: gr.Blocks) -> None:
    """The tab and what its controls do."""
    known = {one.name: one for one in recipes.toggles()}
    first = recipes.expanded(recipes.DEFAULT)
    passes = gr.CheckboxGroup(
        label=texts("passes"),
        info=texts("passes_info"),
        choices=[
            (f"{t.name}: {_plain(t.summary)} [{t.numerics}]", t.name) for t in known.values()
        ],
        value=recipes.names(first),
        elem_id="passes",
        elem_classes=["stacked"],
    )
    recipe = gr.Textbox(
        label=texts("recipe"), info=texts("recipe_info"), value=first, elem_id="recipe"
    )
    complaint = gr.HTML()
    again = gr.State(0)
    with gr.Accordion(texts("options"), open=True):

        def fields(chosen: list[str], text: str) -> None:
            for name in chosen:
                if name in known and known[name].options:
                    _fields(known[name], text, recipe)

        triggers = [passes.change, again.change, page.load]
        gr.render(inputs=[passes, recipe], triggers=triggers)(fields)

    with gr.Row():
        start = gr.Dropdown(label=texts("from_stage"), choices=[RAW], value=RAW)
        stage = gr.Textbox(label=texts("stage"), value=OPTIMIZED, elem_id="stage")
    with gr.Row():
        dry = gr.Button(texts("dry_run"))
        optimize = gr.Button(texts("optimize"), variant="primary")
    targets = gr.CheckboxGroup(
        label=texts("targets"),
        info=texts("targets_info"),
        choices=_targets(),
        value=["ort"],
        elem_id="targets",
        elem_classes=["stacked"],
    )
    with gr.Row():
        precision = gr.Dropdown(
            label=texts("precision"),
            choices=[(texts("of_target"), ""), *((one, one) for one in requests.PRECISIONS)],
            value="",
        )
        shapes = gr.Textbox(label=texts("shapes"), info=texts("shapes_info"), elem_id="shapes")
        batch = gr.Textbox(label=texts("batch"), value="1")
    options = gr.Textbox(label=texts("target_options"), info=texts("target_options_info"))
    emit_only = gr.Checkbox(label=texts("emit_only"))
    with gr.Row():
        build = gr.Button(texts("build"), variant="primary")
        convert = gr.Button(texts("convert"))

    def toggled(chosen: list[str], text: str) -> Any:
        try:
            made = recipes.toggled(text, chosen)
        except SdoptError:  # what cannot be read is said below the text, and stays
            return gr.skip()
        return made if made != text else gr.skip()

    def typed(request: gr.Request, text: str, count: int) -> list[Any]:
        try:
            found = recipes.expanded(text)
        except SdoptError as error:
            return [gr.skip(), gr.skip(), notice_html("", error, spoken(request)), count]
        chosen = [name for name in recipes.names(found) if name in known]
        return [found, chosen, "", count + 1]

    def judged(request: gr.Request, text: str) -> str:
        try:
            specs.passes(shared.app.workspace, text)
        except SdoptError as error:
            return notice_html("", error, spoken(request))
        return ""

    quiet: Any = {"show_progress": "hidden"}
    passes.input(toggled, [passes, recipe], [recipe], **quiet)
    for event in (recipe.submit, recipe.blur):
        event(typed, [recipe, again], [recipe, passes, complaint, again], **quiet)
    recipe.change(judged, [recipe], [complaint], **quiet)

    def stages(bundle: str | None) -> Any:
        return gr.Dropdown(choices=_stages(shared, bundle))

    shared.bundle.change(stages, [shared.bundle], [start], **quiet)
    shared.moved.change(stages, [shared.bundle], [start], **quiet)

    def optimized(dry_run: bool, bundle: str | None, text: str, start: str, stage: str) -> Order:
        name = shared.opened(bundle).path.name
        call = requests.optimize(
            shared.app.workspace, name, text, stage=stage, source=start, dry_run=dry_run
        )
        return name, f"{'dry run' if dry_run else 'optimize'} {stage}", [call]

    def built(
        bundle: str | None,
        targets: list[str],
        options: str,
        precision: str,
        shapes: str,
        batch: str,
        emit_only: bool,
    ) -> Order:
        name = shared.opened(bundle).path.name
        if not targets:
            raise UsageError("no target is chosen", hint="choose one, for example ort")
        call = requests.build(
            shared.app.workspace,
            name,
            targets,
            options=options,
            precision=precision,
            shapes=shapes,
            batch=batch,
            emit_only=emit_only,
        )
        return name, f"build {' '.join(targets)}", [call]

    def converted(bundle: str | None, text: str, start: str, stage: str, *rest: Any) -> Order:
        name, _, (first,) = optimized(False, bundle, text, start, stage)
        _, title, (second,) = built(bundle, *rest)
        second.arguments["source"] = stage
        return name, f"optimize {stage}, {title}", [first, second]

    recipe_form: list[Any] = [shared.bundle, recipe, start, stage]
    build_form = [targets, options, precision, shapes, batch, emit_only]
    shared.submits(dry, functools.partial(optimized, True), recipe_form)
    shared.submits(optimize, functools.partial(optimized, False), recipe_form)
    shared.submits(build, built, [shared.bundle, *build_form])
    shared.submits(convert, converted, [*recipe_form, *build_form])


def _fields(toggle: recipes.Toggle, text: str, recipe: gr.Textbox) -> None:
    """A field per option of a pass; what is typed goes into the recipe."""
    try:
        given = recipes.values(text, toggle)
    except SdoptError:  # said below the recipe
        given = {}
    with gr.Row():
        for option in toggle.options:
            field = gr.Textbox(
                label=f"{toggle.name}: {option.name}",
                info=_plain(option.text or option.takes),
                placeholder=option.default or option.takes,
                value=given.get(option.name, ""),
                key=f"{toggle.name}-{option.name}",
                elem_id=f"option-{toggle.name}-{option.name}",
                min_width=200,
            )

            def put(value: str, text: str, name: str = option.name) -> Any:
                try:
                    # The toggle itself may be on its way: a field is quicker than its answer.
                    named = recipes.toggled(text, [*recipes.names(text), toggle.name])
                    return recipes.with_option(named, toggle, name, value)
                except SdoptError:  # said below the recipe
                    return gr.skip()

            field.change(put, [field, recipe], [recipe], show_progress="hidden")


def _plain(text: str) -> str:
    return text.replace("``", "")


def _stages(shared: Shared, bundle: str | None) -> list[str]:
    """Every stage of the chosen bundle, the raw one first."""
    if not bundle:
        return [RAW]
    opened = shared.opened(bundle)
    found = [stage for name in opened.components for stage in opened.stages(name)]
    return list(dict.fromkeys([RAW, *found]))


def _targets() -> list[tuple[Any, str]]:
    """Each target with whether it can compile here."""
    found: list[tuple[Any, str]] = []
    for word in registry.table("targets"):
        target = registry.resolve("targets", word)()
        summary = (type(target).__doc__ or "").strip().split("\n", 1)[0]
        try:
            target.check_available()
            versions = ", ".join(f"{n} {v}" for n, v in target.versions().items())
            state = versions or "ok"
        except MissingDependencyError as error:
            state = f"- {error.hint}"
        found.append((f"{word}: {_plain(summary)} ({state})", word))
    return found
