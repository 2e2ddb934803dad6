"""Exported graphs against PyTorch, and where their weights come from."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from sdopt import graph, weights
from sdopt.errors import SourceError, WeightsError
from sdopt.exporters import DiffusersSource, Exported, trace
from sdopt.exporters.binding import bind, match
from sdopt.exporters.checkpoint import Checkpoint
from sdopt.exporters.components import COMPONENTS, FAMILIES
from tests.exporters import tiny
from tests.exporters.conftest import Session, inlined, link_tree, run

Get = Callable[[str], Exported]
NAMES = [one.name for one in FAMILIES["sd"].components if not one.optional]
TOLERANCE = 5e-6  # relative L2, fp32

_EDGES = {(h, 8 + i) for i, h in enumerate(range(8, 25))} | {(h, 24) for h in range(8, 25)}
_ALL = {(h, w) for h in range(8, 25) for w in range(8, 25)}
_SOME = sorted(_EDGES | set(random.Random(0).sample(sorted(_ALL - _EDGES), 20)))


def error(got: np.ndarray, want: torch.Tensor) -> float:
    reference = want.double().numpy()
    assert got.shape == reference.shape
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


def check_unet(session: ort.InferenceSession, model: Any, sizes: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate(sizes):
        batch = (2, 1, 3)[number % 3]
        sample = torch.randn(batch, 4, height, width, generator=generator)
        states = torch.randn(batch, 1 + number % 77, 24, generator=generator)
        timestep = torch.tensor(float(number * 977 % 1000))
        with torch.no_grad():
            want = model(sample, timestep, states).sample
        feeds = {
            "sample": sample.numpy(),
            "timestep": timestep.numpy(),
            "encoder_hidden_states": states.numpy(),
        }
        got = session.run(["out_sample"], feeds)[0]
        assert error(got, want) <= TOLERANCE, (batch, height, width)


@pytest.fixture(scope="module")
def unet(pipeline: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(pipeline / "unet").eval()


def test_unet_equals_pytorch(session: Session, unet: Any) -> None:
    check_unet(session("unet"), unet, _SOME)


@pytest.mark.slow
def test_unet_equals_pytorch_at_every_latent(session: Session, unet: Any) -> None:
    check_unet(session("unet"), unet, sorted(_ALL))


@pytest.mark.parametrize("name", ["vae_encoder", "vae_decoder"])
def test_vae_equals_pytorch(session: Session, pipeline: Path, name: str) -> None:
    model = AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate([(8, 8), (9, 13), (13, 23), (24, 11), (1, 2)]):
        batch = (2, 1, 3)[number % 3]
        with torch.no_grad():
            if name == "vae_encoder":
                value = torch.randn(batch, 3, 8 * height, 8 * width, generator=generator)
                want = model.encode(value).latent_dist.parameters
            else:
                value = torch.randn(batch, 4, height, width, generator=generator)
                want = model.decode(value).sample
        got = session(name).run(None, {session(name).get_inputs()[0].name: value.numpy()})[0]
        assert error(got, want) <= TOLERANCE, (batch, height, width)


def check_text(session: ort.InferenceSession, model: Any, last: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 11, 40, 76, 77):
        ids = torch.randint(0, tiny.VOCABULARY - 2, (1 + length % 3, length), generator=generator)
        ids[:, length // 2] = last
        with torch.no_grad():
            want = model(ids)
        got = session.run(None, {"input_ids": ids.numpy()})
        assert error(got[0], want.last_hidden_state) <= TOLERANCE, length
        assert error(got[1], want.pooler_output) <= TOLERANCE, length


def test_text_encoder_equals_pytorch(session: Session, pipeline: Path) -> None:
    model = CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    check_text(session("text_encoder"), model, tiny.VOCABULARY - 1)


def test_text_encoder_with_the_old_end_token(tmp_path: Path) -> None:
    # SD 1.x configurations say eos_token_id 2, for which the highest token is pooled.
    model = tiny.text_encoder(eos_token_id=2)
    model.save_pretrained(tmp_path)
    exported = DiffusersSource(tmp_path).export("text_encoder")
    check_text(run(exported.model), model, tiny.VOCABULARY - 1)


@pytest.mark.parametrize("name", NAMES)
def test_interface_is_that_of_the_table(exported: Get, name: str) -> None:
    model, component = exported(name).model, COMPONENTS[name].of(exported(name).config)
    assert model.opset_imports == {"": 23}
    assert not model.functions
    sizes = {"in_channels": 4 if name == "unet" else 3, "out_channels": 4 if name == "unet" else 3}
    sizes |= {"hidden_size": 24, "cross_attention_dim": 24}
    sizes |= {"latent_channels": 4, "2*latent_channels": 8}
    kinds = {
        "weights": ir.DataType.FLOAT,
        "float32": ir.DataType.FLOAT,
        "int64": ir.DataType.INT64,
    }
    for ports, values in (
        (component.inputs, model.graph.inputs),
        (component.outputs, model.graph.outputs),
    ):
        for port, value in zip(ports, values, strict=True):
            assert value.name == port.name
            assert value.dtype == kinds[port.kind]
            assert value.shape is not None
            dims = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            assert dims == [sizes.get(dim, dim) for dim in port.dims]
    for node in model.graph:
        for value in node.outputs:
            # No symbol of torch's is left, not even inside an expression.
            assert not re.search(r"\bs\d+\b", str(value.shape)), value


@pytest.mark.parametrize("name", NAMES)
def test_the_checker_takes_it(exported: Get, name: str) -> None:
    model = exported(name).model
    onnx.checker.check_model(inlined(model))
    names = [v.name for node in model.graph for v in node.outputs]
    names += [*model.graph.initializers, *(v.name for v in model.graph.inputs)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_a_range_of_the_checkpoint(
    exported: Get, exported_fp16: Get, pipeline: Path, pipeline_fp16: Path, name: str
) -> None:
    folder = COMPONENTS[name].folder
    for get, root in ((exported, pipeline), (exported_fp16, pipeline_fp16)):
        path = next((root / folder).glob("*.safetensors"))
        state = load_file(path)
        model = get(name).model
        ranges = {
            key: value.const_value
            for key, value in model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        for key, tensor in ranges.items():
            assert Path(tensor.path) == path
            weights.check_location(tensor)
            np.testing.assert_array_equal(tensor.numpy(), state[key].numpy())
        rest = set(model.graph.initializers) - set(ranges)
        assert all(key.endswith("position_ids") for key in rest)
        own = {"vae_encoder": ("encoder.", "quant_"), "vae_decoder": ("decoder.", "post_")}
        prefixes = own.get(name, ("",))
        assert set(ranges) == {key for key in state if key.startswith(prefixes)}


def test_fp16_graphs(exported_fp16: Get, pipeline_fp16: Path) -> None:
    for name in NAMES:
        result = exported_fp16(name)
        assert result.dtype == "fp16"
        outputs = {value.dtype for value in result.model.graph.outputs}
        assert outputs == {ir.DataType.FLOAT16}
    inputs = {value.name: value.dtype for value in exported_fp16("unet").model.graph.inputs}
    assert inputs["timestep"] == ir.DataType.FLOAT
    assert inputs["sample"] == inputs["encoder_hidden_states"] == ir.DataType.FLOAT16
    model = AutoencoderKL.from_pretrained(pipeline_fp16 / "vae", torch_dtype=torch.float32).eval()
    latent = torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(0)).half()
    got = run(exported_fp16("vae_decoder").model).run(None, {"latent_sample": latent.numpy()})[0]
    with torch.no_grad():
        assert error(got.astype(np.float32), model.decode(latent.float()).sample) < 5e-3


def test_fp32_from_fp16_is_cast_lazily(exported_fp16: Get, pipeline_fp16: Path) -> None:
    source = DiffusersSource(pipeline_fp16)
    model = source.export("vae_decoder", "fp32").model
    state = load_file(next((pipeline_fp16 / "vae").glob("*.safetensors")))
    for key, value in model.graph.initializers.items():
        assert isinstance(value.const_value, weights.BlockTensor), key
        assert value.dtype == ir.DataType.FLOAT
        np.testing.assert_array_equal(value.const_value.numpy(), state[key].float().numpy())
    network = AutoencoderKL.from_pretrained(
        pipeline_fp16 / "vae", torch_dtype=torch.float32
    ).eval()
    latent = torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = network.decode(latent).sample
    assert error(run(model).run(None, {"latent_sample": latent.numpy()})[0], want) <= TOLERANCE


def test_bf16(pipeline: Path) -> None:
    model = DiffusersSource(pipeline).export("text_encoder", "bf16").model
    assert {v.dtype for v in model.graph.outputs} == {ir.DataType.BFLOAT16}
    onnx.checker.check_model(inlined(model))


def test_fp16_variant_is_taken_as_it_is(copy: Path) -> None:
    path = copy / "text_encoder/model.safetensors"
    tiny.halve(path, copy / "text_encoder/model.fp16.safetensors")
    source = DiffusersSource(copy)
    assert source.dtype_of("text_encoder") == "fp32"
    for dtype, name in (("fp16", "model.fp16.safetensors"), (None, "model.safetensors")):
        model = source.export("text_encoder", dtype).model
        tensors = [v.const_value for v in model.graph.initializers.values()]
        files = {t.location for t in tensors if isinstance(t, ir.ExternalTensor)}
        assert files == {name}


def test_module_paths(exported: Get) -> None:
    model = exported("unet").model
    attentions = [graph.module_path(node) for node in model.graph if node.op_type == "Attention"]
    assert attentions[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert attentions[1] == "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert len(attentions) == 32
    for name in NAMES:
        for node in exported(name).model.graph:
            assert set(node.metadata_props) <= {graph.MODULE_KEY}
            assert not node.doc_string
            path = node.metadata_props.get(graph.MODULE_KEY, "x")
            assert path.replace(".", "").replace("_", "").isalnum()
            for value in node.inputs:
                if (
                    value is not None
                    and value.is_initializer()
                    and "position_ids" not in value.name
                ):
                    assert value.name.rpartition(".")[0] == path


def test_canonical_operators(exported: Get) -> None:
    counts = graph.op_counts(exported("unet").model)
    assert counts["Attention"] == 32
    assert counts["GroupNormalization"] == 61
    assert counts["LayerNormalization"] == 48
    assert counts["Gelu"] == 16
    assert "Identity" not in counts  # dropout and contiguous leave nothing behind


def test_no_component_needs_torchs_decomposition(exported: Get, lowered: list[bool]) -> None:
    for name in NAMES:
        exported(name)
    assert lowered == [True] * 4


def test_torchs_decomposition_gives_the_same(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "lower", lambda program: False)
    slow = run(DiffusersSource(pipeline).export("text_encoder").model)
    check_text(slow, tiny.text_encoder(), tiny.VOCABULARY - 1)


@pytest.mark.parametrize("prefixed", [False, True])
def test_text_encoders_of_both_transformers(copy: Path, prefixed: bool) -> None:
    path = copy / "text_encoder/model.safetensors"
    state = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    prefix = "text_model." if prefixed else ""
    state = {prefix + key: value for key, value in state.items()}
    state[f"{prefix}embeddings.position_ids"] = torch.zeros(1, 77)  # transformers 4.30 and before
    save_file(state, path, metadata={"format": "pt"})
    model = DiffusersSource(copy).export("text_encoder").model
    check_text(run(model), tiny.text_encoder(), tiny.VOCABULARY - 1)
    assert f"{prefix}final_layer_norm.weight" in model.graph.initializers
    paths = {graph.module_path(node) for node in model.graph if node.op_type == "Attention"}
    assert paths == {f"{prefix}encoder.layers.{i}.self_attn" for i in (0, 1)}


def test_vae_saved_before_diffusers_0_18(copy: Path) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tiny.rename(copy / "vae/diffusion_pytorch_model.safetensors", names)
    model = DiffusersSource(copy).export("vae_decoder").model
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in model.graph.initializers
    latent = torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = tiny.vae().decode(latent).sample
    assert error(run(model).run(None, {"latent_sample": latent.numpy()})[0], want) <= TOLERANCE


def test_sharded_checkpoint(copy: Path) -> None:
    model = tiny.vae()
    shutil.rmtree(copy / "vae")
    model.save_pretrained(copy / "vae", max_shard_size="5KB")
    assert len(list((copy / "vae").glob("*-of-*.safetensors"))) > 1
    exported = DiffusersSource(copy).export("vae_decoder").model
    latent = torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model.decode(latent).sample
    assert error(run(exported).run(None, {"latent_sample": latent.numpy()})[0], want) <= TOLERANCE


def test_hub_cache_of_links(pipeline: Path, tmp_path: Path) -> None:
    link_tree(pipeline, tmp_path / "snapshots/abc")
    model = DiffusersSource(tmp_path / "snapshots/abc").export("text_encoder").model
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            weights.check_location(value.const_value)
    check_text(run(model), tiny.text_encoder(), tiny.VOCABULARY - 1)


def test_missing_weights(copy: Path) -> None:
    path = copy / "text_encoder/model.safetensors"
    state = load_file(path)
    gone = [key for key in state if "layers.1.mlp" in key]
    save_file({k: v for k, v in state.items() if k not in gone}, path)
    with pytest.raises(SourceError, match="lacks") as caught:
        DiffusersSource(copy).export("text_encoder")
    assert "encoder.layers.1.mlp.fc1.weight" in str(caught.value)
    assert str(copy / "text_encoder") in str(caught.value)


def test_weights_of_another_shape(copy: Path) -> None:
    path = copy / "text_encoder/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 50}))
    with pytest.raises(SourceError, match="shapes") as caught:
        DiffusersSource(copy).export("text_encoder")
    assert "[48, 24], not [50, 24]" in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "changes", "words"),
    [
        ("text_encoder", {"num_attention_heads": 7}, "cannot be built"),
        ("vae", {"down_block_types": ["NoSuchBlock"]}, "cannot be built"),
        ("unet", {"sample_size": None, "center_input_sample": "x", "freq_shift": "y"}, "traced"),
    ],
)
def test_configurations_that_do_not_work(
    copy: Path, folder: str, changes: dict[str, Any], words: str
) -> None:
    path = copy / folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    source = DiffusersSource(copy)
    with pytest.raises(SourceError, match=words) as caught:
        source.export(next(n for n in source.component_names() if n.startswith(folder)))
    assert f"{folder}/config.json" in str(caught.value)


def test_truncated_weights(copy: Path) -> None:
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="usable"):
        DiffusersSource(copy).export("vae_encoder")


def _two_products(folder: Path, first: str, second: str, held: str) -> tuple[ir.Graph, Checkpoint]:
    """A graph of two MatMuls by weights of these names, and a checkpoint that holds ``held``."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    a, b, x = (ir.Value(name=n, type=kind, shape=ir.Shape([2, 2])) for n in (first, second, "x"))
    nodes = [ir.node("MatMul", [x, a])]
    nodes.append(ir.node("MatMul", [nodes[0].outputs[0], b]))
    for node in nodes:
        node.metadata_props[graph.MODULE_KEY] = first.rpartition(".")[0]
    save_file({held: torch.eye(2)}, folder / "model.safetensors")
    made = ir.Graph([x], nodes[1].outputs, nodes=nodes, initializers=[a, b], name="g")
    return made, Checkpoint.open(folder)


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    names = ("a.weight", "b.weight")
    made, checkpoint = _two_products(tmp_path, *names, held="b.weight")
    keys = match(dict.fromkeys(names, (2, 2)), [names], checkpoint, "here")
    assert keys == dict.fromkeys(names, "b.weight")
    bind(ir.Model(made, ir_version=10), keys, checkpoint, ir.DataType.FLOAT)
    assert list(made.initializers) == ["b.weight"]
    first, second = made
    assert second.inputs[1] is first.inputs[1]


def test_network_of_transformers_4_and_checkpoint_of_5(tmp_path: Path) -> None:
    # As installed here transformers drops text_model.; its version 4 has it in the network.
    name = "text_model.norm.weight"
    made, checkpoint = _two_products(tmp_path, name, "tied", held="norm.weight")
    keys = match({name: (2, 2), "tied": (2, 2)}, [(name, "tied")], checkpoint, "here")
    bind(ir.Model(made, ir_version=10), keys, checkpoint, ir.DataType.FLOAT)
    assert list(made.initializers) == ["norm.weight"]
    assert {graph.module_path(node) for node in made} == {"norm"}
