from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdopt import weights as weights_module
from sdopt.errors import SdoptError, SpecError, UsageError, WeightsError
from sdopt.modelfile import load
from sdopt.modelfile import save as save_model
from sdopt.passes.base import Role
from sdopt.passes.fuse_qkv import FuseQkv
from sdopt.passes.lora import Lora
from sdopt.pipeline import Pipeline, RunContext
from sdopt.staging import optimize_file
from tests.passes.adapters import (
    CONV,
    FIRST,
    GEMM,
    PROJ,
    SHAPES,
    K,
    Q,
    V,
    base_weights,
    factors,
    graph_of,
    kohya,
    product,
    rename,
    save,
    weight,
)
from tests.toolkit import apply, leaves, model_of, relative_l2, run

EXACT = 1e-6

Tensors = dict[str, np.ndarray]


def kohya_file(
    file: Path, alpha: float | None = None, seed: int = 1, dtype: type = np.float32
) -> str:
    tensors: Tensors = {}
    for path in SHAPES:
        down, up = factors(path, seed=seed, dtype=dtype)
        tensors[f"{kohya(path)}.lora_down.weight"] = down
        tensors[f"{kohya(path)}.lora_up.weight"] = up
        if alpha is not None:
            tensors[f"{kohya(path)}.alpha"] = np.array(alpha, dtype)
    return save(file, tensors)


def dotted_file(file: Path, down: str, up: str, paths: tuple[str, ...] = tuple(SHAPES)) -> str:
    tensors: Tensors = {}
    for path in paths:
        tensors[down.format(path)], tensors[up.format(path)] = factors(path)
    return save(file, tensors)


def check(model: ir.Model, factor: float, seeds: tuple[int, ...] = (1,)) -> None:
    """Every weight equals the merge written out in float64."""
    for path, base in base_weights().items():
        updates = sum(product(path, *factors(path, seed=seed)) for seed in seeds)
        wanted = base.astype(np.float64) + factor * updates
        assert relative_l2(weight(model, path), wanted) <= EXACT, path
        assert relative_l2(base, wanted) > 0.1  # the update is no rounding error


@pytest.mark.parametrize(("alpha", "factor"), [(None, 0.8), (1.0, 0.4), (8.0, 3.2)])
def test_kohya_keys_with_and_without_alpha(
    tmp_path: Path, alpha: float | None, factor: float
) -> None:
    model = graph_of(base_weights())
    ctx = apply(Lora(kohya_file(tmp_path / "a.safetensors", alpha), 0.8), model)
    assert ctx.rewrites == {"adapted_weight": 7}
    check(model, factor)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        ("unet.{}.lora_A.default.weight", "unet.{}.lora_B.default.weight"),
        ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
        ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
        ("{}.lora_down.weight", "{}.lora_up.weight"),
    ],
)
def test_spellings_with_dots(tmp_path: Path, down: str, up: str) -> None:
    model = graph_of(base_weights())
    apply(Lora(dotted_file(tmp_path / "a.safetensors", down, up)), model, role=Role.DENOISER)
    check(model, 1.0)


def test_attention_processors_of_old_diffusers(tmp_path: Path) -> None:
    attention = Q.removesuffix(".to_q")
    out = f"{attention}.to_out.0"
    down, up = factors(Q)
    base = base_weights()
    model = graph_of(base)
    rename(model, {f"{Q}.weight": f"{out}.weight"})
    start = f"unet.{attention}.processor"
    tensors = {}
    for name in ("to_out", "to_k"):
        tensors |= {f"{start}.{name}_lora.down.weight": down}
        tensors |= {f"{start}.{name}_lora.up.weight": up}
    apply(Lora(save(tmp_path / "a.safetensors", tensors)), model)
    for path, before in ((out, Q), (K, K)):
        wanted = base[before] + product(Q, down, up)
        assert relative_l2(weight(model, path), wanted) <= EXACT


@pytest.mark.parametrize("stored", ["text_model.", ""])
@pytest.mark.parametrize(
    ("start", "down", "up"),
    [
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_", "down", "up"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_", "down", "up"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_", "A", "B"),
        ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.", "down", "up"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.", "down", "up"),
    ],
)
def test_text_encoders(tmp_path: Path, stored: str, start: str, down: str, up: str) -> None:
    """With and without ``text_model.``, which transformers 5 dropped; UNet keys are left alone."""
    name = f"{stored}encoder.layers.0.self_attn.q_proj"
    base, (a, b) = base_weights()[Q], factors(Q)
    text = "g (float[2,8] x) => (float[2,8] y) { t = Transpose<perm=[1,0]>(w)\n y = MatMul(x, t) }"
    model = model_of(text, {"w": base})
    rename(model, {"w": f"{name}.weight"})
    tensors = {f"{start}{down}.weight": a, f"{start}{up}.weight": b}
    tensors |= {"lora_unet_x.lora_down.weight": a, "lora_unet_x.lora_up.weight": b}
    file = save(tmp_path / "a.safetensors", tensors)
    for role in (Role.TEXT_ENCODER, Role.MODEL):
        one = model.clone()
        apply(Lora(file), one, role=role)
        assert relative_l2(weight(one, name), base + product(Q, a, b)) <= EXACT


def test_the_second_text_encoder_is_known_by_its_projection(tmp_path: Path) -> None:
    base = base_weights()[Q]
    text = "g (float[2,8] x) => (float[2,8] y) { y = MatMul(x, w) }"
    tensors: Tensors = {}
    for seed, prefix in enumerate(("lora_te1_", "lora_te2_")):
        down, up = factors(Q, seed=seed)
        tensors |= {f"{prefix}fc1.lora_down.weight": down, f"{prefix}fc1.lora_up.weight": up}
    file = save(tmp_path / "a.safetensors", tensors)
    for seed, kind in enumerate(("CLIPTextModel", "CLIPTextModelWithProjection")):
        model = model_of(text, {"w": base})
        rename(model, {"w": "fc1.weight"})
        apply(Lora(file), model, role=Role.TEXT_ENCODER, config={"architectures": [kind]})
        wanted = base + product(Q, *factors(Q, seed=seed)).T
        assert relative_l2(weight(model, "fc1"), wanted) <= EXACT


def test_outputs_are_those_of_layers_with_adapters_in_pytorch(tmp_path: Path) -> None:
    base = {path: torch.from_numpy(array) for path, array in base_weights().items()}
    feeds = {
        "image": np.random.default_rng(3).standard_normal((1, 4, 6, 6)).astype(np.float32),
        "x": np.random.default_rng(4).standard_normal((2, 8)).astype(np.float32),
    }

    def layer(path: str, x: torch.Tensor) -> torch.Tensor:
        down, up = (torch.from_numpy(one) for one in factors(path))
        if x.dim() == 2:
            return x @ base[path].T + 0.5 * 4 / 2 * (x @ down.T @ up.T)
        pad = 1 if path == CONV else 0
        low = torch.conv2d(torch.conv2d(x, down, padding=pad), up)
        return torch.conv2d(x, base[path], padding=pad) + 0.5 * 4 / 2 * low

    image, x = (torch.from_numpy(feeds[name]) for name in ("image", "x"))
    wanted = [layer(PROJ, layer(CONV, image)), *(layer(path, x) for path in (Q, K, V))]
    wanted.append(layer(GEMM, layer(FIRST, x)))
    model = graph_of(base_weights())
    apply(Lora(kohya_file(tmp_path / "a.safetensors", 4.0), 0.5), model)
    for found, want in zip(run(model, feeds), wanted, strict=True):
        assert relative_l2(found, want.numpy()) < 2e-6


@pytest.mark.parametrize("kernel_in", ["mid", "down"])
def test_locon_with_a_factor_in_the_middle(tmp_path: Path, kernel_in: str) -> None:
    rng = np.random.default_rng(5)
    down = rng.standard_normal((2, 4, 1, 1)).astype(np.float32)
    mid = rng.standard_normal((2, 2, 3, 3)).astype(np.float32)
    up = rng.standard_normal((6, 2, 1, 1)).astype(np.float32)
    start = kohya(CONV)
    tensors = {
        f"{start}.lora_down.weight": down,
        f"{start}.lora_mid.weight": mid,
        f"{start}.lora_up.weight": up,
    }
    if kernel_in == "down":  # two kernels in a row are no update of one kernel
        tensors[f"{start}.lora_down.weight"] = rng.standard_normal((2, 4, 3, 3)).astype(np.float32)
    file = save(tmp_path / "a.safetensors", tensors)
    model = graph_of(base_weights())
    if kernel_in == "down":
        with pytest.raises(WeightsError, match="do not fit"):
            apply(Lora(file), model)
        return
    apply(Lora(file), model)
    image = torch.from_numpy(rng.standard_normal((1, 4, 6, 6)).astype(np.float32))
    d, m, u = (torch.from_numpy(one) for one in (down, mid, up))
    added = torch.conv2d(torch.conv2d(torch.conv2d(image, d), m, padding=1), u)
    merged = torch.from_numpy(weight(model, CONV) - base_weights()[CONV])
    assert relative_l2(torch.conv2d(image, merged, padding=1).numpy(), added.numpy()) < 1e-5


def test_a_matrix_adapter_for_a_1x1_kernel_and_the_reverse(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for path in (PROJ, Q):
        down, up = factors(path)
        extra = (1, 1) if path == Q else ()
        tensors[f"{kohya(path)}.lora_down.weight"] = down.reshape(2, -1, *extra)
        tensors[f"{kohya(path)}.lora_up.weight"] = up.reshape(-1, 2, *extra)
    model, base = graph_of(base_weights()), base_weights()
    apply(Lora(save(tmp_path / "a.safetensors", tensors)), model)
    for path in (PROJ, Q):
        wanted = base[path] + product(path, *factors(path))
        assert relative_l2(weight(model, path), wanted) <= EXACT


def test_half_weights_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base = base_weights(np.float16)
    model = graph_of(base)
    file = kohya_file(tmp_path / "a.safetensors", 1.0, dtype=np.float16)
    other = kohya_file(tmp_path / "b.safetensors", 1.0, seed=2, dtype=np.float16)
    apply(Lora(file, 0.3), model)
    apply(Lora(other, 0.2), model)
    for path, array in base.items():
        a, b = (product(path, *factors(path, seed=s, dtype=np.float16)) for s in (1, 2))
        wanted = array.astype(np.float64) + 0.3 / 2 * a + 0.2 / 2 * b
        found = weight(model, path)
        assert found.dtype == np.float16
        rounded = wanted.astype(np.float16)
        assert np.mean(found == rounded) > 0.98  # float32 sums may fall beside a tie
        assert relative_l2(found, wanted) < 4e-4


def test_bfloat16_adapters(tmp_path: Path) -> None:
    down, up = factors(Q)
    tensors = {
        f"{kohya(Q)}.lora_{name}.weight": torch.from_numpy(one).bfloat16()
        for name, one in (("down", down), ("up", up))
    }
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    model = graph_of(base_weights())
    apply(Lora(str(file)), model)
    rounded = (one.astype(ml_dtypes.bfloat16).astype(np.float32) for one in (down, up))
    assert relative_l2(weight(model, Q), base_weights()[Q] + product(Q, *rounded)) <= EXACT


def test_two_adapters_in_either_order(tmp_path: Path) -> None:
    a = Lora(kohya_file(tmp_path / "a.safetensors", seed=1), 0.5)
    b = Lora(kohya_file(tmp_path / "b.safetensors", seed=2), 0.5)
    one, other = graph_of(base_weights()), graph_of(base_weights())
    for first, second, model in ((a, b, one), (b, a, other)):
        Pipeline((first, second)).run(model, RunContext(role=Role.DENOISER))
        check(model, 0.5, seeds=(1, 2))
    for path in SHAPES:
        assert relative_l2(weight(one, path), weight(other, path)) <= EXACT


def test_the_fused_projection_holds_the_merged_ones(tmp_path: Path) -> None:
    text = """g (float[1,3,8] x) => (float[1,3,8] y) {
        tq = Transpose<perm=[1,0]>(w_q)
        q = MatMul(x, tq)
        tk = Transpose<perm=[1,0]>(w_k)
        k = MatMul(x, tk)
        tv = Transpose<perm=[1,0]>(w_v)
        v = MatMul(x, tv)
        y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)
    }"""
    base = base_weights()
    model = model_of(text, {"w_q": base[Q], "w_k": base[K], "w_v": base[V]})
    rename(model, {"w_q": f"{Q}.weight", "w_k": f"{K}.weight", "w_v": f"{V}.weight"})
    style = ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight")
    file = dotted_file(tmp_path / "a.safetensors", *style, paths=(Q, K, V))
    x = np.random.default_rng(6).standard_normal((1, 3, 8)).astype(np.float32)
    alone = model.clone()
    apply(Lora(file), alone)
    Pipeline((Lora(file), FuseQkv())).run(model, RunContext(role=Role.DENOISER))
    (fused,) = (
        v.const_value
        for n, v in model.graph.initializers.items()
        if "qkv" in n and v.const_value is not None and len(v.const_value.shape) == 2
    )
    merged = [base[path] + product(path, *factors(path)) for path in (Q, K, V)]
    assert relative_l2(fused.numpy(), np.concatenate(merged)) <= EXACT
    assert relative_l2(run(model, {"x": x})[0], run(alone, {"x": x})[0]) < 5e-6


@pytest.mark.parametrize("block_bytes", [4, 40, 100, 1 << 20])
def test_weights_are_merged_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """From a file to a file, in blocks of rows; the pass itself reads no weight."""
    save_model(graph_of(base_weights()), tmp_path / "in.onnx")
    model = load(tmp_path / "in.onnx")
    external = [v for v in model.graph.initializers.values() if v.name != f"{GEMM}.weight"]
    for value in external:  # small ones lie in the ONNX file: move them out as if they were large
        assert value.const_value is not None
        data = tmp_path / f"{value.name}.bin"
        data.write_bytes(value.const_value.tobytes())
        shape, dtype = value.const_value.shape, value.const_value.dtype
        value.const_value = ir.ExternalTensor(
            data.name,
            0,
            data.stat().st_size,
            dtype,
            shape=shape,
            name=data.stem,
            base_dir=tmp_path,
        )
    reads: list[object] = []
    whole = weights_module.read_blocks

    def counted(tensor: ir.TensorProtocol, block: int = block_bytes) -> weights_module.Blocks:
        reads.append(tensor)
        for one in whole(tensor, block):
            assert one.nbytes <= max(block, 4)
            yield one

    monkeypatch.setattr(weights_module, "read_blocks", counted)
    monkeypatch.setattr(weights_module, "BLOCK_BYTES", block_bytes)
    apply_unchecked(Lora(kohya_file(tmp_path / "a.safetensors")), model)
    assert not reads
    for value in external:
        tensor = value.const_value
        assert isinstance(tensor, weights_module.BlockTensor)
        rows = [block.size for block in tensor.blocks()]
        columns = tensor.size // tensor.shape.numpy()[0]
        assert all(size % columns == 0 for size in rows)
        assert max(rows) * 4 <= max(block_bytes, columns * 4)
    check(model, 1.0)


def apply_unchecked(one: Lora, model: ir.Model) -> None:
    Pipeline((one,)).run(model, RunContext())


def test_a_graph_in_a_file_and_what_is_remembered(tmp_path: Path) -> None:
    source, out, again = (tmp_path / f"{name}.onnx" for name in ("in", "out", "again"))
    save_model(graph_of(base_weights()), source)
    file = kohya_file(tmp_path / "a.safetensors")
    optimize_file(source, out, f"lora={file}:scale=0.5")
    check(load(out), 0.5)
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(Path(file).read_bytes())
    report = optimize_file(out, again, f"lora={copy}:scale=0.5").components[0].passes[0]
    assert not report.changed
    assert report.skips[0].reason == "this adapter was merged already"
    check(load(again), 0.5)
    with pytest.raises(UsageError, match="at another scale"):
        optimize_file(out, again, f"lora={copy}:scale=0.25")
    other = kohya_file(tmp_path / "b.safetensors", seed=2)
    optimize_file(out, again, f"lora={other}:scale=0.5")
    check(load(again), 0.5, seeds=(1, 2))


def test_another_file_under_the_same_name_decides_another_result(tmp_path: Path) -> None:
    one = Lora(kohya_file(tmp_path / "a.safetensors", seed=1))
    before = Pipeline((one,)).reads()
    kohya_file(tmp_path / "a.safetensors", seed=2)
    assert Pipeline((one,)).reads() != before
    assert Pipeline.parse("fuse_qkv").reads() == []


def test_peft_says_alpha_in_its_configuration(tmp_path: Path) -> None:
    keys = {"base_model.model.{}.lora_A.weight": 0, "base_model.model.{}.lora_B.weight": 1}
    tensors = {k.format(p): factors(p)[i] for p in (Q, K) for k, i in keys.items()}
    file = save(tmp_path / "adapter_model.safetensors", tensors)
    base = base_weights()
    settings: dict[str, object] = {"lora_alpha": 6, "r": 2, "alpha_pattern": {"attn1.to_k": 3}}
    for rslora, factor in ((False, 3.0), (True, 6 / 2**0.5)):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps(settings | {"use_rslora": rslora})
        )
        model = graph_of(base)
        apply(Lora(file), model)
        for path, ratio in ((Q, factor), (K, factor / 2)):
            wanted = base[path] + ratio * product(path, *factors(path))
            assert relative_l2(weight(model, path), wanted) <= EXACT
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(WeightsError, match="DoRA"):
        apply(Lora(file), graph_of(base))


def test_diffusers_says_alpha_in_the_header(tmp_path: Path) -> None:
    down, up = factors(Q)
    tensors = {f"unet.{Q}.lora_A.weight": down, f"unet.{Q}.lora_B.weight": up}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 2})}
    model = graph_of(base_weights())
    apply(Lora(save(tmp_path / "a.safetensors", tensors, metadata)), model)
    assert relative_l2(weight(model, Q), base_weights()[Q] + 4 * product(Q, down, up)) <= EXACT


def test_nothing_for_this_component_or_nothing_to_merge_into(tmp_path: Path) -> None:
    down, up = factors(Q)
    keys = ("lora_te_fc1.lora_down.weight", "lora_te_fc1.lora_up.weight")
    file = save(tmp_path / "a.safetensors", dict(zip(keys, (down, up), strict=True)))
    model = graph_of(base_weights())
    ctx = apply(Lora(file), model, role=Role.DENOISER)
    assert [skip.reason for skip in ctx.skips] == ["the adapter holds nothing for a denoiser"]
    assert not ctx.rewrites
    empty = model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    leaves(Lora(file), empty, "no weight matrices")


def test_the_vae_is_not_asked() -> None:
    assert Pipeline.parse("lora=a.safetensors").for_role(Role.VAE_DECODER).passes == ()


def test_unknown_keys_are_an_error_with_the_nearest_names(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    down, up = factors(Q)
    wrong = Q.replace("blocks.0.attn1", "blocks.1.attn1")
    tensors = {
        f"{kohya(p)}.lora_{n}.weight": o
        for p in (Q, wrong)
        for n, o in (("down", down), ("up", up))
    }
    model = graph_of(base_weights())
    before = dict(model.graph.initializers)
    with pytest.raises(WeightsError, match=r"adapts 2 weights .* 1 do not match") as error:
        apply(Lora(save(file, tensors)), model)
    assert f"{kohya(wrong)}: nearest: {Q}" in (error.value.why or "")
    assert all(model.graph.initializers[name] is value for name, value in before.items())


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "names of the original"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", "another base model"),
    ],
)
def test_an_sdxl_adapter_on_sd15(tmp_path: Path, key: str, hint: str) -> None:
    down, up = factors(Q)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    with pytest.raises(WeightsError, match="none of them matches") as error:
        apply(Lora(save(tmp_path / "a.safetensors", tensors)), graph_of(base_weights()))
    assert hint in (error.value.hint or "")
    tensors |= {"lora_te2_fc.lora_down.weight": down, "lora_te2_fc.lora_up.weight": up}
    file = save(tmp_path / "b.safetensors", tensors)
    with pytest.raises(WeightsError) as error:
        apply(Lora(file), graph_of(base_weights()), role=Role.DENOISER)
    assert "SDXL" in (error.value.hint or "")


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    down, up = factors(Q)
    for index, (a, b) in enumerate([(down[:, :6], up), (down, up[:6]), (down[:1], up)]):
        tensors = {f"{kohya(Q)}.lora_down.weight": a, f"{kohya(Q)}.lora_up.weight": b}
        model = graph_of(base_weights())
        with pytest.raises(WeightsError, match="1 of the adapter's 1 updates do not fit") as error:
            apply(Lora(save(tmp_path / f"{index}.safetensors", tensors)), model)
        assert "the weight is [8, 8]" in (error.value.why or "")
        np.testing.assert_array_equal(weight(model, Q), base_weights()[Q])


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    model = graph_of(base_weights())

    def says(file: Path | str, message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            apply(Lora(str(file)), model)

    says(tmp_path / "missing.safetensors", "cannot be read")
    says(tmp_path, "cannot be read")
    text = tmp_path / "text.safetensors"
    text.write_text("this is no safetensors file")
    says(text, "not a usable weights file")
    says(save(tmp_path / "none.safetensors", {}), "holds no adapter")
    down, up = factors(Q)
    start = kohya(Q)
    names = ("lora_down.weight", "lora_up.weight")
    pair = {f"{start}.{name}": one for name, one in zip(names, (down, up), strict=True)}
    half = {f"{start}.lora_down.weight": down}
    says(save(tmp_path / "half.safetensors", half), "no adapter that can be merged")
    for name in ("dora_scale", "hada_w1_a", "lora_B.bias"):
        file = save(tmp_path / f"{name}.safetensors", pair | {f"{start}.{name}": up})
        says(file, "no adapter that can be merged")
    twice = pair | {f"unet.{Q}.{name}": one for name, one in zip(names, (down, up), strict=True)}
    says(save(tmp_path / "twice.safetensors", twice), "changes .* twice")


def test_a_sum_that_leaves_the_range_is_an_error_when_it_is_written(tmp_path: Path) -> None:
    model = graph_of(base_weights(np.float16))
    apply_unchecked(Lora(kohya_file(tmp_path / "a.safetensors"), 1e6), model)
    with pytest.raises(WeightsError, match="no longer finite"):
        weight(model, Q)


def test_order_and_options(tmp_path: Path) -> None:
    for text in ("fuse_qkv,lora=a.safetensors", "cast_bf16,lora=a", "cast_fp16,lora=a"):
        with pytest.raises(SpecError, match="must come after lora"):
            Pipeline.parse(text)
    text = "lora=a.safetensors,lora=b.safetensors:scale=0.5,fuse_qkv,cast_fp16"
    assert str(Pipeline.parse(text)) == text
    with pytest.raises(SpecError, match="finite"):
        Pipeline.parse("lora=a:scale=nan")
    with pytest.raises(SpecError, match="needs a value"):
        Pipeline.parse("lora")
    with pytest.raises(SdoptError, match="cannot be read"):
        Pipeline.parse(f"lora={tmp_path / 'a'}").run(graph_of(base_weights()), RunContext())


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
    kohya_file(tmp_path / "a.safetensors")
    model = graph_of(base_weights())
    apply(Lora("~/a.safetensors"), model)
    check(model, 1.0)


def test_names_that_underscores_confuse(tmp_path: Path) -> None:
    model = graph_of(base_weights())
    rename(model, {f"{Q}.weight": "a.b_c.weight", f"{K}.weight": "a_b.c.weight"})
    down, up = factors(Q)

    def file(key: str) -> str:
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        return save(tmp_path / f"{key}.safetensors", tensors)

    with pytest.raises(WeightsError, match="could be either of"):
        apply(Lora(file("lora_unet_a_b_c")), model)
    apply(Lora(file("unet.a_b.c")), model)
    np.testing.assert_array_equal(weight(model, "a.b_c"), base_weights()[Q])
    assert relative_l2(weight(model, "a_b.c"), base_weights()[K] + product(Q, down, up)) <= EXACT
