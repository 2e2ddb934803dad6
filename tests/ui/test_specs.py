"""What a user types as passes or a target names files below the root, and runs nothing."""

from __future__ import annotations

import dataclasses

import pytest

from sdopt import registry
from sdopt.errors import PathError, SdoptError, SpecError, UnknownNameError, UsageError
from sdopt.ui import specs
from sdopt.ui.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("specs") / "root"
    (root / "lo ras").mkdir(parents=True)
    (root / "lo ras" / "a,b.safetensors").touch()
    (root / "recorded").mkdir()
    (root / "x.safetensors").touch()
    (root / "out.safetensors").symlink_to("/etc/passwd")
    return Workspace(root)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("@fast,tome=5:ratio=0.3,cast_fp16:keep=io+mid_block", None),
        (" clean , fuse_qkv", "clean,fuse_qkv"),
        ("lora=x.safetensors:scale=0.5", None),
        ('lora="lo ras/a,b.safetensors"', None),
        ("clean,quantize=int8:data=recorded", None),
    ],
)
def test_what_stays_below_the_root_is_taken(
    workspace: Workspace, text: str, same: str | None
) -> None:
    assert specs.passes(workspace, text) == (same or text)


@pytest.mark.parametrize(
    "text",
    [
        "lora=/etc/passwd",
        "lora=~/x.safetensors",
        "lora=../x.safetensors",
        "lora=out.safetensors",
        "lora=nowhere.safetensors",
        "lora=org/name",
        "lora=.sdopt-ui/lock",
        "quantize=int8:data=/etc",
        "cast_fp16:keep=/etc/passwd",
        "hoist:prompt=../x",
    ],
)
def test_what_leads_out_of_it_is_not(workspace: Workspace, text: str) -> None:
    with pytest.raises(PathError):
        specs.passes(workspace, text)


@pytest.mark.parametrize("text", ["graphsurgeon=os.system", "mine.recipe", "clean,/etc/x.txt "])
def test_no_code_is_run_and_no_recipe_read(workspace: Workspace, text: str) -> None:
    with pytest.raises(UsageError):
        specs.passes(workspace, text)


def test_targets_likewise(workspace: Workspace) -> None:
    for text in ("ort", "ort:threads=2", "trt:dtype=fp16", "trt:dtype=int8:data=recorded"):
        assert specs.target(workspace, text) == text
    for text in (
        "trt:cache=/tmp/cache",
        "trt:dtype=int8:data=../x",
        "tpu:python=/bin/sh",
        "ort:stage=../x",
    ):
        with pytest.raises(UsageError):
            specs.target(workspace, text)
    with pytest.raises(PathError):
        specs.target(workspace, "ort:stage=../x")
    assert specs.adapter(workspace, "x.safetensors", 0.5) == "x.safetensors:0.5"
    with pytest.raises(PathError):
        specs.adapter(workspace, "out.safetensors")


@pytest.mark.parametrize(
    ("text", "kind"), [("cleen", UnknownNameError), ("clean,,", SpecError), ("tome=x", SpecError)]
)
def test_mistakes_are_told_as_ever(
    workspace: Workspace, text: str, kind: type[SdoptError]
) -> None:
    with pytest.raises(kind):
        specs.passes(workspace, text)


def test_every_option_that_names_a_file_is_known() -> None:
    """An option called otherwise would be looked at as text; this fails when one is added."""
    plain = {"keep", "prompt", "step", "steps", "cut", "axes", "soc", "at", "batch", "dims", "sm"}
    plain |= {"stage"}  # a name, which check_stage_name holds to one
    known = plain | {"chip", *specs._FILES, *specs.RUN.values()}
    for kind in ("passes", "targets"):
        for name, place in registry.table(kind).items():
            if place.startswith("sdopt."):
                fields = dataclasses.fields(registry.resolve(kind, name))
                texts = {one.name for one in fields if "str" in str(one.type)}
                assert texts <= known, (name, texts - known)
