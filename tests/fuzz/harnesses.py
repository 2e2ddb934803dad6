"""One function per kind of input, bytes to nothing: the real entry points in a sandbox.

Whatever the bytes are, an entry point returns or raises an ``SdoptError`` that says something; no
file outside the sandbox's ``work`` is changed or read; memory and time stay small.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sdopt import api, artifacts, modelfile, recorded, registry, shapes, spec
from sdopt.adapters import files, requests
from sdopt.bundle import Bundle
from sdopt.exporters import DiffusersSource, SingleFileSource
from sdopt.exporters.checkpoint import Checkpoint
from sdopt.merging import Merge
from sdopt.pipeline import Pipeline
from sdopt.requirements import parse_requirements
from sdopt.safetensors_header import read_header
from tests.fuzz import mutations, seeds
from tests.fuzz.mutations import Mutate
from tests.fuzz.sandbox import SECRET, Sandbox
from tests.specs import SPECS

RECORD, PLAN, ORIGINS = "sdopt.record", "sdopt.companions", "sdopt.origins"

_FOREIGN = ("lora", "simplify", "graphsurgeon", "quantize")
PASSES = [text for text in SPECS if not text.startswith(_FOREIGN)]
PASSES += ["@fast", "@fast_fp16", "quantize=w8", "quantize=w4:block=16"]


@dataclass(frozen=True)
class Harness:
    """What is done with the bytes, valid bytes to begin with, and how these are made hostile."""

    run: Callable[[Sandbox, bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    mutate: Mutate


def turn(data: bytes, choices: Sequence[Any]) -> Any:
    """One of the choices, by the bytes alone: the same input is the same example."""
    return choices[zlib.crc32(data) % len(choices)]


def onnx_file(box: Sandbox, data: bytes) -> None:
    """An ONNX file of anyone's: looked at, taken in, rewritten by a pass."""
    work = box.fresh()
    path = work / "in" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(data)
    (path.parent / seeds.DATA_FILE).write_bytes(seeds.DATA)
    (path.parent / "link.bin").symlink_to(f"../../outside/{SECRET}")
    (path.parent / "links").symlink_to("../../outside")
    given = len(data)
    box.call(given, modelfile.metadata, path)
    if box.call(given, api.inspect, path, weights=True) is None:
        return
    box.call(given, api.adopt, path, work / "adopted")
    chosen = turn(data, PASSES)
    box.call(given, api.optimize_file, path, work / "out" / "model.onnx", chosen)
    box.call(given, api.optimize_file, path, path.with_name("out.onnx"), "clean,raise_ops")


def text(box: Sandbox, data: bytes) -> None:
    """What a user writes: passes, a recipe, requirements, a target, sizes, adapters."""
    work = box.fresh()
    words = data.decode("utf-8", "surrogateescape")
    found = box.call(len(data), Pipeline.parse, words)
    if found is not None:
        assert Pipeline.parse(str(found)) == found
    items = box.call(len(data), spec.parse, words)
    if items is not None and not _both_quotes(items):
        assert spec.parse(spec.render(items)) == items
    recipe = work / "a.recipe"
    recipe.write_bytes(data)
    box.call(len(data), Pipeline.parse, str(recipe))
    box.call(len(data), parse_requirements, words)
    box.call(len(data), registry.make, "targets", words)
    box.call(len(data), shapes.parse_sizes, words)
    box.call(len(data), requests.read, [words])
    box.call(len(data), Merge.parse, [words], in_place=False)
    box.call(len(data), artifacts.recorded, recipe)


def _both_quotes(items: Sequence[spec.Item]) -> bool:
    parts = [part for one in items for values in (one.value, *dict(one.options).values()) for part in values or ()]  # fmt: skip
    return any("'" in part and '"' in part for part in parts)


def adapter(box: Sandbox, data: bytes) -> None:
    """A LoRA file: read, and merged into a graph whose weights it may fit."""
    work = box.fresh()
    path = work / "lora.safetensors"
    path.write_bytes(data)
    (work / "model.onnx").write_bytes(seeds.graphs()[-2])
    given = len(data)
    box.call(given, requests.read, [path])
    box.call(given, read_header, path)
    if box.call(given, files.read, path) is not None:
        out = work / "out.onnx"
        box.call(given, api.optimize_file, work / "model.onnx", out, f'lora="{path}"')


def checkpoint(box: Sandbox, data: bytes) -> None:
    """A single file, and the same bytes as a component's weights in a diffusers folder."""
    work = box.fresh()
    path = work / "sd.safetensors"
    path.write_bytes(data)
    given = len(data)
    source = box.call(given, SingleFileSource, path)
    if source is not None:
        for act in (source.shared_files, lambda: source.notes, lambda: source.family):
            box.call(given, act)
    folder = work / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(seeds.UNET))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    held = box.call(given, Checkpoint.open, folder / "unet")
    if held is not None:
        box.call(given, held.fingerprint)
        box.call(given, lambda: held.dtype)
        source = DiffusersSource(folder)
        box.call(given, source.remarks, ["unet"])
        box.call(given, source.fingerprint, "unet", "fp16")


FOLDER = ("model_index.json", "unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json", "unet/diffusion_pytorch_model.safetensors.index.json")  # fmt: skip
"""The files of a diffusers folder that are fuzzed, by the first byte of the input."""


def folder(box: Sandbox, data: bytes) -> None:
    """A diffusers folder, one of whose JSON files is hostile."""
    work = box.fresh()
    root = work / "pipeline"
    for name, content in _pipeline().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    path = root / FOLDER[data[0] % len(FOLDER)] if data else root / FOLDER[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[1:])
    if path.name.endswith(".index.json"):
        (root / "unet" / "diffusion_pytorch_model.safetensors").rename(root / "unet" / "a.safetensors")  # fmt: skip
    given = len(data)
    source = box.call(given, DiffusersSource, root)
    if source is None:
        return
    for act in (source.shared_files, source.check_in_place, lambda: (source.notes, source.family)):
        box.call(given, act)
    for name in source.component_names():
        box.call(given, source.fingerprint, name)


@cache
def _pipeline() -> Mapping[str, bytes]:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None], "requires_safety_checker": True}  # fmt: skip
    encoder = {"architectures": ["CLIPTextModel"], "hidden_size": 24, "hidden_act": "gelu"}
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}, "added_tokens": [{"content": "x", "id": 1}]}  # fmt: skip
    shard = {"metadata": {}, "weight_map": {"conv_in.weight": "a.safetensors"}}
    files = [index, seeds.UNET, encoder, tokenizer, shard]
    made = {name: json.dumps(one).encode() for name, one in zip(FOLDER, files, strict=True)}
    weights = seeds.tensors({"conv_in.weight": (8, 4, 3, 3)})
    made["unet/diffusion_pytorch_model.safetensors"] = weights
    made["text_encoder/model.safetensors"] = weights
    return made


def _folder_seeds() -> list[bytes]:
    made = _pipeline()
    return [bytes([index]) + made[name] for index, name in enumerate(FOLDER)]


BUNDLE = ("manifest.json", "unet/config.json", RECORD, PLAN, ORIGINS)
"""What is fuzzed of a bundle: two files, and the entries of a stage's metadata."""

VERBS: tuple[tuple[str, Callable[[Path, Path], Any]], ...] = (
    ("optimize", lambda root, out: api.optimize(root, "clean,fuse_qkv,tome=1", stage="more")),
    ("from optimized", lambda root, out: api.optimize(root, "cast_fp16", source="optimized", stage="half")),
    ("again", lambda root, out: api.optimize(root, "clean,hoist,deep_cache=3", force=True)),
    ("dry", lambda root, out: api.optimize(root, "@fast", dry_run=True, require="attention=all")),
    ("pack", lambda root, out: api.pack(root, out)),
    ("pack raw", lambda root, out: api.pack(root, out, stage="model")),
    ("build", lambda root, out: api.build(root, "onnx:opset=17", source="model", check=True)),
    ("adopt", lambda root, out: api.adopt(root / "unet" / "optimized.onnx", out)),
    ("adopt into", lambda root, out: api.adopt(root / "unet" / "optimized.onnx", root, component="other")),
    ("file", lambda root, out: api.optimize_file(root / "unet" / "optimized.onnx", root / "x.onnx", "clean")),
)  # fmt: skip
"""Each is given the bundle and a folder that is not there; the bytes choose one."""


@cache
def _bundle() -> Mapping[str, bytes]:
    """The files of the bundle, and under their keys the entries of the optimized stage."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "bundle"
        seeds.bundle(root)
        made = {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }
    model = onnx.load_from_string(made["unet/optimized.onnx"])
    return made | {one.key: one.value.encode() for one in model.metadata_props}


def bundle(box: Sandbox, data: bytes) -> None:
    """A bundle, part of which is hostile, through ``inspect`` and one more verb."""
    work = box.fresh()
    root = work / "bundle"
    part = BUNDLE[data[0] % len(BUNDLE)] if data else BUNDLE[0]
    for name, content in _bundle().items():
        if "/" in name or ("." in name and not name.startswith("sdopt.")):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    if part.startswith("sdopt."):
        for stage in ("optimized", "model") if part == RECORD else ("optimized",):
            _annotate(root / "unet" / f"{stage}.onnx", part, data[1:])
    else:
        (root / part).write_bytes(data[1:])
    (root / "link").symlink_to("../../outside")
    given = len(data) + 32_000
    box.call(given, api.inspect, root, weights=True)
    _, verb = turn(data, VERBS)
    box.call(given, verb, root, work / "out")
    if data[:1] == bytes([BUNDLE.index(RECORD)]):
        (root / "manifest.json").unlink(missing_ok=True)
        box.call(given, Bundle.open, root)


def _annotate(path: Path, key: str, value: bytes) -> None:
    model = onnx.load(path, load_external_data=False)
    kept = {one.key: one.value for one in model.metadata_props}
    kept[key] = value.decode("utf-8", "replace")
    del model.metadata_props[:]
    for name, text in kept.items():
        model.metadata_props.add(key=name, value=text)
    path.write_bytes(model.SerializeToString())


def _bundle_seeds() -> list[bytes]:
    made = _bundle()
    return [bytes([index]) + made[name] for index, name in enumerate(BUNDLE)]


def recording(box: Sandbox, data: bytes) -> None:
    """The index of recorded samples, and each sample that it names."""
    work = box.fresh()
    home = work / "recorded"
    home.mkdir()
    (home / "unet-0.npz").write_bytes(_sample())
    (home / "link.npz").symlink_to(f"../../outside/{SECRET}")
    (home / "index.json").write_bytes(data)
    box.call(len(data), recorded.index_digest, home)
    found = box.call(len(data), recorded.open_recording, home)
    if found is not None:
        box.call(len(data), found.counts)
        for one in found.samples[:3]:
            box.call(len(data), found.load, one)


def sample(box: Sandbox, data: bytes) -> None:
    """The bytes of a recorded sample whose digest is right."""
    work = box.fresh()
    (work / "a.npz").write_bytes(data)
    one = recorded.Sample(
        "a.npz", recorded.digest_of(data), "unet", {"x": ("float32", (2, 2))}, "", 0
    )
    made = recorded.Recording(work, "k", {}, {}, (one,))
    box.call(len(data), made.load, one)


def artifact(box: Sandbox, data: bytes) -> None:
    """The record beside a compiled file."""
    work = box.fresh()
    path = work / "unet.plan"
    path.write_bytes(b"plan")
    artifacts.record_path(path).write_bytes(data)
    found = box.call(len(data), artifacts.recorded, path)
    box.call(len(data), artifacts.known, path, "k")
    assert found is None or found.size == len(b"plan")


@cache
def _sample() -> bytes:
    held = io.BytesIO()
    np.savez(held, allow_pickle=False, x=np.zeros((2, 2), np.float32))
    return held.getvalue()


def _recording_seeds() -> list[bytes]:
    one = {"file": "unet-0.npz", "digest": recorded.digest_of(_sample()), "component": "unet", "inputs": {"x": ["float32", [2, 2]]}, "prompt": "a", "seed": 0, "step": 1, "timestep": 0.5}  # fmt: skip
    index = {"schema": 1, "key": "k", "settings": {"steps": 2}, "origins": {"unet": {"stage": "model", "digest": "d"}}, "samples": [one, {**one, "file": "link.npz"}]}  # fmt: skip
    return [json.dumps(index).encode()]


def _artifact_seeds() -> list[bytes]:
    made = artifacts.Artifact("unet.plan", "k", "d", len(b"plan"), 1.5, {"x": "1"}, {"y": [1]})
    return [json.dumps(made.__dict__).encode()]


TEXTS = (
    b"@fast,tome=5:ratio=0.5,cast_fp16:keep=io+mid_block.*",
    b"hoist:prompt=context+pooled:step=sigma,deep_cache=0:steps=1+2+4",
    b"lora='a, b.safetensors':scale=0.8,quantize=w4:block=16,fix_shapes=B@2+S@16,lower_opset=17",
    b"attention=all,geglu=16",
    b"trt:dtype=fp16",
    b"256x256..1024x1024,512x512",
    b"style.safetensors:0.8",
    b"clean # first\n\nraise_ops,\nfuse_qkv",
    b"a.recipe",
)

HARNESSES: Mapping[str, Harness] = {
    "onnx": Harness(onnx_file, seeds.graphs, mutations.in_onnx),
    "text": Harness(text, lambda: TEXTS, mutations.in_text),
    "adapter": Harness(adapter, seeds.adapters, mutations.in_weights),
    "checkpoint": Harness(checkpoint, seeds.checkpoints, mutations.in_weights),
    "folder": Harness(folder, _folder_seeds, mutations.behind_the_first(mutations.in_json)),
    "bundle": Harness(bundle, _bundle_seeds, mutations.behind_the_first(mutations.in_json)),
    "recording": Harness(recording, _recording_seeds, mutations.in_json),
    "sample": Harness(sample, lambda: [_sample()], mutations.in_bytes),
    "artifact": Harness(artifact, _artifact_seeds, mutations.in_json),
}
"""By name, as ``python -m tests.fuzz NAME`` takes them."""
