"""What passes cover: in reports, as data and as text, and as requirements that a run must meet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import api, modelfile
from sdopt.bundle import Bundle
from sdopt.errors import RequirementError, SpecError
from sdopt.passes.base import PassContext
from sdopt.pipeline import Pipeline, RunContext
from sdopt.report import ComponentReport, PassReport, Report, Skip
from sdopt.requirements import Requirement, enforce, judge, parse_requirements
from tests.test_bundle import make_bundle
from tests.toolkit import model_of

NORMS = """g (float[1,4,2,2] x, float[4] s) => (float[1,4,2,2] y) {
    a = GroupNormalization<num_groups=2>(x, scale, bias)
    b = GroupNormalization<num_groups=2>(a, scale, bias)
    y = GroupNormalization<num_groups=2>(b, s, bias)
}"""
"""Two group norms that lower_group_norm takes, and one whose scale is computed."""


def norms(path: Path | None = None) -> ir.Model:
    ones = {name: np.ones(4, np.float32) for name in ("scale", "bias")}
    model = model_of(NORMS, ones)
    if path is not None:
        modelfile.save(model, path)
    return model


def said(spec: str, done: int = 0, present: int = 0, *left: str, kind: str = "gelu") -> PassReport:
    """A report of a pass that did, found done, and left that much of one kind."""
    return PassReport(
        spec=spec,
        numerics="exact",
        seconds=0.0,
        nodes_before=9,
        nodes_after=9,
        ops_before={},
        ops_after={},
        rewrites={kind: done} if done else {},
        skips=tuple(Skip(f"{reason} is odd", f"at.{i}", kind) for i, reason in enumerate(left)),
        notes=(),
        new_bytes=0,
        changed=bool(done),
        present={kind: present} if present else {},
    )


def component(name: str, *passes: PassReport) -> ComponentReport:
    return ComponentReport(name, "optimized", passes=list(passes))


# Coverage


def test_coverage_is_what_was_found_and_what_became_of_it() -> None:
    (report,) = Pipeline.parse("lower_group_norm").run(norms(), RunContext())
    (one,) = report.coverage()
    assert (one.kind, one.found, one.done, one.rewritten, one.present) == (
        "group_norm",
        3,
        2,
        2,
        0,
    )
    assert [skip.reason for skip in one.left] == ["its scale is computed, not a weight"]


def test_what_is_no_kind_only_tallies() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { i = Identity(x)\n y = Relu(i) }")
    (report,) = Pipeline.parse("clean").run(model, RunContext())
    assert report.coverage() == []
    assert report.tallies() == {"no-op removed": 1}


def test_a_kind_is_one_word() -> None:
    ctx = PassContext(norms())
    with pytest.raises(ValueError, match="one word with underscores, not 'group norm'"):
        ctx.already("group norm")
    with pytest.raises(ValueError, match="one word"):
        ctx.skip("it is odd", "here", "group norm")
    ctx.skip("it is odd", "here")
    ctx.already("group_norm", 2)
    ctx.already("group_norm")
    assert ctx.present == {"group_norm": 3}


def test_json_holds_the_coverage_of_each_pass(tmp_path: Path) -> None:
    norms(tmp_path / "in.onnx")
    report = api.optimize_file(
        tmp_path / "in.onnx", tmp_path / "out.onnx", "clean,lower_group_norm", dry_run=True
    )
    data = json.loads(json.dumps(report.to_json()))
    clean, lowered = data["components"][0]["passes"]
    assert clean["coverage"] == []
    assert lowered["coverage"] == [
        {
            "kind": "group_norm",
            "found": 3,
            "done": 2,
            "rewritten": 2,
            "present": 0,
            "left": [
                {"reason": "its scale is computed, not a weight", "where": "GroupNormalization"}
            ],
        }
    ]
    assert (data["requirements"], data["met"]) == ([], True)


BLOCK = """g (float[B,S,8] x, float[B,T,6] c) => (float[B,S,2,4] y) {{
    tq = Transpose<perm=[1,0]>(wq)
    tk = Transpose<perm=[1,0]>(wk)
    tv = Transpose<perm=[1,0]>(wv)
    q = MatMul(x, tq)
    k = MatMul({source}, tk)
    v = MatMul({source}, tv)
    rq = Reshape(q, heads)
    rk = Reshape({k}, heads)
    rv = Reshape(v, heads)
    hq = Transpose<perm=[0,2,1,3]>(rq)
    hk = Transpose<perm=[0,2,1,3]>(rk)
    hv = Transpose<perm=[0,2,1,3]>(rv)
    a = Attention(hq, hk, hv)
    y = Transpose<perm=[0,2,1,3]>(a)
}}"""


def block(source: str, k: str = "k") -> ir.Model:
    width = 8 if source == "x" else 6
    weights = {f"w{o}": np.ones((8, 8 if o == "q" else width), np.float32) for o in "qkv"}
    text = BLOCK.format(source=source, k="kk" if k != "k" else "k")
    text = text.replace("rq = Reshape", f"kk = {k}\nrq = Reshape") if k != "k" else text
    return model_of(text, weights | {"heads": np.array([0, 0, 2, 4])})


@pytest.mark.parametrize(
    ("model", "kind", "found", "done"),
    [
        (block("x"), "self_attention_qkv", 1, 1),
        (block("c"), "cross_attention_kv", 1, 1),
        (block("x", "Relu(k)"), "other_projections", 1, 0),
    ],
    ids=["self", "cross", "other"],
)
def test_projections_are_counted_by_what_they_are(
    model: ir.Model, kind: str, found: int, done: int
) -> None:
    first, again = Pipeline.parse("fuse_qkv,fuse_qkv").run(model, RunContext())
    for report, present in ((first, 0), (again, done)):
        (one,) = report.coverage()
        assert (one.kind, one.found, one.done, one.present) == (kind, found, done, present)


def test_a_cast_counts_the_nodes_that_compute_in_half_and_names_the_others() -> None:
    text = """g (bool c, float[2] x, int64[2] i) => (float[2] y, int64[2] j) {
        a = Add(x, w)
        b = If (c) <
            then_branch = t () => (float[2] p) { p = Relu(a) },
            else_branch = e () => (float[2] q) { q = Neg(a) }
        >
        m = Mul(b, big)
        y = Relu(m)
        j = Add(i, i)
    }"""
    weights = {"w": np.ones(2, np.float32), "big": np.full(2, 1e6, np.float32)}
    (report,) = Pipeline.parse("cast_fp16").run(model_of(text, weights), RunContext())
    (one,) = report.coverage()
    assert (one.kind, one.found, one.done) == ("node", 4, 2)
    assert [skip.reason for skip in one.left] == [
        "If stays in fp32, with all inside",
        "big holds values beyond 65504: kept in fp32",
    ]


# The grammar


def test_requirements_are_read_and_printed() -> None:
    text = "attention=all,geglu=16,gelu=0"
    found = parse_requirements(text)
    assert found == (
        Requirement("attention"),
        Requirement("geglu", 16),
        Requirement("gelu", 0),
    )
    assert ",".join(map(str, found)) == text


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("attention", "how many of attention?", "attention=all or attention=N"),
        ("attention=most", "attention must be all or a whole number, not 'most'", ""),
        ("attention=-1", "not '-1'", ""),
        ("attention=1.5", "not '1.5'", ""),
        ("attention=all+1", "not 'all\\+1'", ""),
        ("attention=all:of=unet", "a requirement has no options", "KIND=all or KIND=N"),
        ("gelu=all,gelu=2", "gelu is required twice", ""),
        ("gelu=all,,geglu=2", "an empty item", ""),
        ("", "nothing is required", "KIND=all"),
        ("@fast=all", "@fast is no kind", ""),
    ],
)
def test_what_is_no_requirement(text: str, message: str, hint: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_requirements(text)
    assert hint in (caught.value.hint or "")
    assert "^" in (caught.value.where or "")


# The verdicts


@pytest.mark.parametrize(
    ("text", "components", "met", "done", "found"),
    [
        ("gelu=all", [component("unet", said("raise_ops", 4))], True, 4, 4),
        ("gelu=all", [component("unet", said("raise_ops", 1, 3))], True, 4, 4),
        ("gelu=all", [component("unet", said("raise_ops", 3, 0, "its erf"))], False, 3, 4),
        ("gelu=3", [component("unet", said("raise_ops", 3, 0, "its erf"))], True, 3, 4),
        ("gelu=4", [component("unet", said("raise_ops", 3, 0, "its erf"))], False, 3, 4),
        ("gelu=2", [component("unet", said("raise_ops", 3))], False, 3, 3),
        # Two components add up, and one that finds none is no failure.
        (
            "gelu=5",
            [
                component("unet", said("raise_ops", 2)),
                component("text_encoder", said("raise_ops", 3)),
                component("vae_decoder", said("raise_ops")),
            ],
            True,
            5,
            5,
        ),
        (
            "gelu=all",
            [
                component("unet", said("raise_ops", 2)),
                component("text_encoder", said("raise_ops", 0, 0, "its tanh")),
            ],
            False,
            2,
            3,
        ),
        # The last run of a pass decides; a run that speaks of nothing is no run.
        (
            "gelu=all",
            [component("unet", said("raise_ops", 1, 0, "x"), said("raise_ops", 1, 1))],
            True,
            2,
            2,
        ),
        (
            "gelu=all",
            [component("unet", said("raise_ops", 2), said("clean"), said("raise_ops"))],
            True,
            2,
            2,
        ),
        # Two passes must both have covered theirs, whichever comes last.
        (
            "gelu=all",
            [component("unet", said("raise_ops", 1, 0, "x"), said("quick_gelu=a2", 1))],
            False,
            1,
            2,
        ),
        (
            "gelu=all",
            [component("unet", said("raise_ops", 2), said("quick_gelu=a2", 1, 0, "x"))],
            False,
            1,
            2,
        ),
        # Nothing found.
        ("gelu=all", [component("unet", said("raise_ops", 2, kind="silu"))], False, 0, 0),
        ("gelu=1", [component("unet")], False, 0, 0),
        ("gelu=0", [component("unet")], True, 0, 0),
        ("gelu=0", [component("unet", said("raise_ops", 0, 0, "x"))], True, 0, 1),
        ("gelu=0", [component("unet", said("raise_ops", 1))], False, 1, 1),
    ],
)
def test_a_verdict(
    text: str, components: list[ComponentReport], met: bool, done: int, found: int
) -> None:
    (verdict,) = judge(parse_requirements(text), components)
    assert (verdict.requirement, verdict.met, verdict.done, verdict.found) == (
        text,
        met,
        done,
        found,
    )
    assert bool(verdict.why) is not met
    report = Report("optimize", "b", components, requirements=[verdict])
    assert report.met is met
    if met:
        enforce(report)
    else:
        with pytest.raises(RequirementError) as caught:
            enforce(report)
        assert caught.value.exit_code == 1


def test_a_verdict_names_places_reasons_and_near_kinds() -> None:
    left = ("its erf", "its tanh", "its tanh", "a", "b")
    components = [
        component("unet", said("raise_ops", 7, 0, *left)),
        component("text_encoder", said("raise_ops", 1)),
    ]
    (verdict,) = judge(parse_requirements("gelu=all"), components)
    # Equal reasons are said once, at their first place; the rest is counted.
    assert verdict.why == (
        "gelu: raise_ops has 8 of 13 done",
        "  its erf is odd (at at.0, unet)",
        "  its tanh is odd (at at.1 and 1 more, unet)",
        "  a is odd (at at.3, unet)",
        "  and 1 other reasons",
    )
    (verdict,) = judge(parse_requirements("gelus=all"), components)
    assert verdict.why == ("no gelus was found (did you mean gelu?)",)
    (verdict,) = judge(parse_requirements("gelu=13"), components)
    assert verdict.why[0] == "gelu: raise_ops has 8 of 13 done, not 13"


# What is written


def test_a_file_is_written_only_when_its_requirement_is_met(tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    norms(source)
    for text, met in (("group_norm=all", False), ("group_norm=3", False), ("group_norm=2", True)):
        report = api.optimize_file(source, out, "lower_group_norm", require=text)
        assert report.met is met
        assert out.exists() is met
        assert bool(report.components[0].digest) is met


@pytest.fixture
def two(tmp_path: Path) -> Bundle:
    """A bundle of two components: one whose group norms are lowered, one with one that is not."""
    bundle = make_bundle(tmp_path / "b", ("text_encoder", "unet"))
    whole = model_of(NORMS.replace("(b, s, bias)", "(b, scale, bias)"), ones())
    with bundle.lock():
        for name, model in (("text_encoder", whole), ("unet", norms())):
            bundle.commit(model, bundle.stage(name, "model").record)
    return bundle


def ones() -> dict[str, np.ndarray]:
    return {name: np.ones(4, np.float32) for name in ("scale", "bias")}


def stages(bundle: Bundle) -> dict[str, tuple[str, ...]]:
    return {name: tuple(bundle.stages(name)) for name in bundle.components}


def test_no_component_is_committed_unless_all_requirements_are_met(two: Bundle) -> None:
    before = stages(two)
    report = api.optimize(two.path, "lower_group_norm", require="group_norm=all")
    assert not report.met
    assert [each.digest for each in report.components] == ["", ""]
    assert stages(Bundle.open(two.path)) == before
    report = api.optimize(two.path, "lower_group_norm", require="group_norm=5")
    assert report.met
    assert all(each.digest for each in report.components)
    assert stages(Bundle.open(two.path)) == dict.fromkeys(before, ("model", "optimized"))


def test_what_was_there_stays_as_it_was(two: Bundle) -> None:
    api.optimize(two.path, "clean")
    old = two.stage("unet", "optimized").digest
    assert not api.optimize(two.path, "lower_group_norm", require="group_norm=all").met
    assert two.stage("unet", "optimized").digest == old


def test_a_stage_that_is_up_to_date_is_judged_and_not_written_again(two: Bundle) -> None:
    api.optimize(two.path, "lower_group_norm")
    path = two.stage("unet", "optimized").path
    written = path.stat().st_mtime_ns
    for text, met in (("group_norm=5", True), ("group_norm=all", False)):
        report = api.optimize(two.path, "lower_group_norm", require=text)
        assert report.met is met
        assert all(each.up_to_date for each in report.components)
        assert [len(each.passes) for each in report.components] == [1, 1]
    assert path.stat().st_mtime_ns == written


def test_a_dry_run_is_judged_too(two: Bundle) -> None:
    before = stages(two)
    assert not api.optimize(two.path, "lower_group_norm", require="gelu=1", dry_run=True).met
    assert api.optimize(two.path, "lower_group_norm", require="group_norm=5", dry_run=True).met
    assert stages(Bundle.open(two.path)) == before
