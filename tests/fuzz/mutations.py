"""Valid files made hostile, with their structure known: by hypothesis's random, or by atheris's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

Mutate = Callable[[Random, bytes], bytes]

NUMBERS = (0, 1, -1, 2, 7, 255, 1 << 15, 1 << 31, (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, 10**15)
INT64 = (1 << 63) - 1
PLACES = (
    "../outside/secret.bin",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "link.bin",
    "links/secret.bin",
    "weights.bin",
    "missing.bin",
    "",
    ".",
    "..",
    "weights.bin/",
    "model.onnx",
    "./weights.bin",
    "weights\0.bin",
    "w" * 5000,
    "~/x",
    "file:///etc/passwd",
    "..\\outside\\secret.bin",
)
"""Where a file may say that another lies; ``link.bin`` and ``links`` lead out of the folder."""

WORDS = (*PLACES, "model", "unet", "clean", "lora=x", "quantize=w8", "\ud83d\ude00", "\u202e", "\x1b[31m", "%s", "{}", "NaN", "1e999", "'", '"', "@fast", "text encoder", "denoiser", "x" * 10_000)  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**15, -(10**30), 10**400,
    [], {}, [[]], [None], {"a": {}}, "", [1, "x"], {"": None}, [10**9] * 4, [-1, 2],
)  # fmt: skip


def in_bytes(random: Random, data: bytes) -> bytes:
    """Some bytes changed, dropped, doubled, or the end cut off: no structure is needed."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(found) + 1)
        match random.randrange(6):
            case 0:
                del found[at:]
            case 1:
                del found[at : at + random.choice((1, 2, 4, 64))]
            case 2:
                found[at:at] = bytes(random.choice((b"\0", b"\xff" * 9, b'"', b"{", b"\n", b"-1")))
            case 3 if at < len(found):
                found[at] ^= 1 << random.randrange(8)
            case 4 if at < len(found):
                found[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
            case _:
                found[at:at] = found[at : at + random.choice((1, 8, 100))]
    return bytes(found)


def in_text(random: Random, data: bytes) -> bytes:
    """Words of the grammar and of trouble put anywhere."""
    marks = (",", ":", "=", "+", "@", "#", " ", "\n", "'", '"', "\0", "\u00e9", "-")
    text = data.decode("utf-8", "replace")
    for _ in range(random.choice((1, 2, 5))):
        at = random.randrange(len(text) + 1)
        word = str(random.choice((*marks, *WORDS, *NUMBERS, "tome=5:ratio=0.5", "lora=a.st:scale=nan", "fix_shapes=B@2")))  # fmt: skip
        text = (
            text[:at]
            + word * random.choice((1, 1, 1, 100))
            + text[at + random.choice((0, 1, 9)) :]
        )
    return text.encode("utf-8", "surrogatepass")


def in_json(random: Random, data: bytes) -> bytes:
    """Values of another kind, keys lost, doubled and strange, tables that are nested deep."""
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        return in_bytes(random, data)
    for _ in range(random.choice((1, 1, 2, 3))):
        table = _other(random, table)
    text = json.dumps(table)
    match random.randrange(24):
        case 0:
            return b"[" * 100_000 + b"]" * 100_000
        case 1:
            depth = random.choice((20, 900, 3000, 50_000))
            return text.replace("{", '{"deep": ' + "[" * depth + "]" * depth + ", ", 1).encode()
        case 2:
            return text.replace(":", f': {"9" * 5000}, "n":', 1).encode()
        case 3:
            return in_bytes(random, text.encode())
        case 4:
            return b"\xff\xfe" + text.encode("utf-16-le")
        case 5:
            return text.replace("e", "\\ud800", 1).encode()
        case _:
            return text.encode()


def behind_the_first(mutate: Mutate) -> Mutate:
    """The same of everything but the first byte, which says what the rest is."""
    return lambda random, data: data[:1] + mutate(random, data[1:])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        one = stack.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            yield one, key
            if isinstance(one[key], dict | list):
                stack.append(one[key])


def _other(random: Random, table: Any) -> Any:
    places = list(_places(table)) if isinstance(table, dict | list) else []
    if not places or random.randrange(20) == 0:
        return copy.deepcopy(random.choice(JUNK))
    holder, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(WORDS)] = copy.deepcopy(holder[key])
        case 2:
            holder[key] = random.choice(WORDS)
        case 3:
            holder[key] = {random.choice(WORDS): holder[key]}
        case 4 if isinstance(holder[key], int | float):
            holder[key] = random.choice((*NUMBERS, 0.5, -0.0, str(holder[key])))
        case _:
            holder[key] = copy.deepcopy(random.choice(JUNK))
    return table


def in_onnx(random: Random, data: bytes) -> bytes:
    """One to three of ``ONNX``, or of ``in_bytes`` where it is no model."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return in_bytes(random, data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = random.choice(ONNX)
        if model.graph.node:
            try:
                change(random, model)
            except (
                ValueError,
                DecodeError,
            ):  # what a field cannot hold, and deeper than protobuf goes
                return in_bytes(random, model.SerializeToString())
    found = model.SerializeToString()
    if random.randrange(20) == 0:  # text that is no UTF-8
        words = [word for node in model.graph.node for word in (*node.output, node.op_type)]
        name = random.choice(words or ["x"])
        if isinstance(name, str) and name:  # what is no UTF-8 comes as bytes
            return found.replace(name.encode(), b"\xff" * len(name.encode()))
    return found


def _tensor(random: Random, model: onnx.ModelProto) -> TensorProto:
    held = list(model.graph.initializer)
    held += [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
    return random.choice(held) if held else model.graph.initializer.add(name="added", data_type=1)


def _dims(random: Random, model: onnx.ModelProto) -> None:
    tensor = _tensor(random, model)
    wild = ([-1], [INT64], [1 << 31] * 3, [0], [], [10**15], [2] * 40, [1] * 3000, [-2, -3])
    tensor.dims[:] = random.choice(wild)


def _kind(random: Random, model: onnx.ModelProto) -> None:
    _tensor(random, model).data_type = random.choice((*range(-1, 30), 9999, -(1 << 31)))


def _data(random: Random, model: onnx.ModelProto) -> None:
    tensor = _tensor(random, model)
    match random.randrange(4):
        case 0:
            tensor.raw_data = tensor.raw_data[:-1]
        case 1:
            tensor.ClearField("raw_data")
        case 2:
            tensor.ClearField("raw_data")
            tensor.float_data.extend([float("nan")] * random.choice((1, 4, 100)))
        case _:
            tensor.string_data.extend([b"\xff\xfe", b"x"])


def _external(random: Random, model: onnx.ModelProto) -> None:
    tensor = _tensor(random, model)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    numbers = ("0", "4096", "-1", "9" * 30, "x", "", "1e3", " 8", "0x10", "\u0664", str(INT64))
    for key in random.choice((("location",), ("location", "offset", "length"), ("offset",), (), ("location", "length", "checksum", "what"))):  # fmt: skip
        value = random.choice(PLACES if key == "location" else numbers)
        tensor.external_data.add(key=key, value=value)
    if random.randrange(2):
        _dims(random, model)


def _values(random: Random, model: onnx.ModelProto) -> None:
    """Values that are made twice, late, never, or by nobody."""
    node = random.choice(model.graph.node)
    names = [name for one in model.graph.node for name in (*one.input, *one.output)]
    name = random.choice((*names, "", "nowhere", "x" * 100_000, "\0"))
    side = random.choice((node.input, node.output))
    if side and random.randrange(2):
        side[random.randrange(len(side))] = name
    else:
        side.append(name)


def _fewer(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    side = random.choice((node.input, node.output, node.attribute, model.graph.initializer, model.graph.input, model.graph.output, model.graph.node))  # fmt: skip
    if len(side):
        del side[random.randrange(len(side)) :]


def _attribute(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    names = [a.name for one in model.graph.node for a in one.attribute]
    names += ["axis", "axes", "perm", "to", "value", "epsilon", "then_branch", "start", "end", ""]
    known = {a.name: a for a in node.attribute}
    name = random.choice(names)
    attr = known.get(name) or node.attribute.add(name=name)
    if random.randrange(3) == 0:
        attr.type = random.choice((*range(15), 99))
        return
    attr.CopyFrom(
        random.choice(
            (
                helper.make_attribute(name, random.choice((0, -1, 99, INT64, -INT64))),
                helper.make_attribute(name, [random.choice((0, 1, -9, INT64))] * 5),
                helper.make_attribute(name, "\u00e9"),
                helper.make_attribute(name, b"\xff"),
                helper.make_attribute(name, float("nan")),
                helper.make_attribute(name, [1.0]),
                helper.make_attribute(name, helper.make_tensor("t", 1, [1 << 40], b"", raw=True)),
                helper.make_attribute(name, helper.make_tensor("t", 8, [1], [b"\xff"])),
                helper.make_attribute(name, helper.make_graph([], "g", [], [])),
                helper.make_attribute_ref_name(helper.make_attribute(name, 1), "outer"),
                onnx.AttributeProto(name=name),
            )
        )
    )


def _versions(random: Random, model: onnx.ModelProto) -> None:
    match random.randrange(4):
        case 0:
            model.ir_version = random.choice((0, -1, 3, 99, INT64))
        case 1:
            del model.opset_import[:]
        case 2:
            model.opset_import.add(domain=random.choice(("", "ai.onnx", "x")), version=0)
        case _:
            for one in model.opset_import:
                one.version = random.choice((0, -1, 9, 13, 17, 9999, INT64))


def _operator(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    kinds = ("", "If", "Loop", "Scan", "Constant", "ConstantOfShape", "Reshape", "Expand", "Tile", "Split", "Resize", "Range", "Shape", "Gather", "Slice", "Concat", "Cast", "Attention", "MatMul", "Nonsense", "\u00e9", "SequenceAt", "Gemm", "GroupNormalization", "Softmax", "Pad", "Transpose", "Where", "Identity")  # fmt: skip
    node.op_type = random.choice(kinds)
    if random.randrange(4) == 0:
        node.domain = random.choice(("", "ai.onnx", "com.microsoft", "nowhere", "ai.onnx.ml"))


def _ports(random: Random, model: onnx.ModelProto) -> None:
    port = random.choice((*model.graph.input, *model.graph.output, *model.graph.value_info)) if model.graph.input else model.graph.input.add()  # fmt: skip
    match random.randrange(6):
        case 0:
            port.ClearField("type")
        case 1:
            port.type.sequence_type.elem_type.tensor_type.elem_type = 1
        case 2:
            port.type.tensor_type.elem_type = random.choice((-1, 0, 8, 30, 9999))
        case 3:
            port.type.tensor_type.shape.dim.add(dim_value=random.choice((-5, 0, INT64)))
        case 4:
            port.type.tensor_type.shape.dim.add(dim_param=random.choice(WORDS))
        case _:
            port.name = random.choice(("", "\0", "y", "x"))


def _metadata(random: Random, model: onnx.ModelProto) -> None:
    keys = ("sdopt.record", "sdopt.companions", "sdopt.origins", "sdopt.module", "")
    texts = ("", "{}", "[]", "null", "{" * 5000, "\x00", '{"schema": 99}', '{"schema": "x"}', '{"weights": []}', '{"weights": {"w": {"how": []}}}', '{"graphs": [{"name": 1}]}')  # fmt: skip
    holder = random.choice((model, model.graph, random.choice(model.graph.node)))
    holder.metadata_props.add(key=random.choice(keys), value=random.choice(texts))


def _function(random: Random, model: onnx.ModelProto) -> None:
    """A local function that calls itself, or another of the same name."""
    name = random.choice((model.graph.node[0].op_type, "f"))
    for _ in range(random.choice((1, 2))):
        one = model.functions.add(name=name, domain=random.choice(("", "here")))
        one.input.append("a")
        one.output.append("b")
        one.node.add(op_type=name, domain=one.domain, input=["a"], output=["b"])
        one.opset_import.add(domain="", version=17)
    node = random.choice(model.graph.node)
    node.op_type, node.domain = name, model.functions[-1].domain


def _nested(random: Random, model: onnx.ModelProto) -> None:
    """Bodies in bodies, to protobuf's own limit and beyond."""
    body = onnx.GraphProto(name="leaf")
    (given, *_) = (*model.graph.node[0].output, "x")
    body.node.add(op_type="Identity", input=[given], output=["deep"])
    body.output.add(name="deep")
    for level in range(random.choice((2, 20, 28))):
        outer = onnx.GraphProto(name=f"level{level}")
        node = outer.node.add(op_type="If", input=["flag"], output=[f"o{level}"])
        node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)
        node.attribute.add(name="else_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(body) if level < 3 else None  # fmt: skip
        outer.output.add(name=f"o{level}")
        body = outer
    model.graph.node.extend(body.node)
    model.graph.input.add(name="flag").type.tensor_type.elem_type = 9


def _extras(random: Random, model: onnx.ModelProto) -> None:
    match random.randrange(5):
        case 0:
            model.graph.sparse_initializer.add().values.name = "s"
        case 1:
            model.training_info.add().algorithm.node.add(op_type="x")
        case 2:
            model.graph.quantization_annotation.add(tensor_name="nothing")
        case 3:
            model.ClearField("graph")
        case _:
            model.graph.initializer.extend(list(model.graph.initializer))


ONNX: tuple[Callable[[Random, onnx.ModelProto], None], ...] = (
    _dims, _kind, _data, _external, _external, _values, _values, _fewer, _attribute, _attribute,
    _versions, _operator, _operator, _ports, _metadata, _function, _nested, _extras,
)  # fmt: skip


def in_weights(random: Random, data: bytes) -> bytes:
    """A safetensors file with another header: its JSON, its length, its end."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match random.randrange(8):
        case 0:
            return in_bytes(random, data)
        case 1:
            wild = random.choice((0, 1, length - 1, length + 1, 100_000_001, (1 << 64) - 1))
            return (wild & ((1 << 64) - 1)).to_bytes(8, "little") + data[8:]
        case 2:
            body = body[: random.randrange(len(body) + 1)]
        case 3:
            made = _fitting(random, header)
            return made if made is not None else in_bytes(random, data)
        case _:
            header = in_json(random, header)
    return len(header).to_bytes(8, "little") + header + body


def _fitting(random: Random, header: bytes) -> bytes | None:
    """Shapes and types changed so that the file still holds together, with fitting data."""
    try:
        table = json.loads(header)
    except (ValueError, RecursionError):
        return None
    if not isinstance(table, dict):
        return None
    entries = {n: e for n, e in table.items() if isinstance(e, dict) and "shape" in e}
    if not entries:
        return None
    for name in random.sample(sorted(entries), min(3, len(entries))):
        wild = ([], [0], [1], [3, 0], [1 << 40, 0], [2, 2], [1] * 40, [4, 1, 1, 1], [5])
        table[name] = {**entries[name], "shape": random.choice(wild)}
        if random.randrange(3) == 0:
            table[name]["dtype"] = random.choice(("BOOL", "U8", "I64", "BF16", "F8_E4M3", "F64"))
        if random.randrange(3) == 0:
            table[random.choice(("lora_unet_.alpha", ".lora_A.weight", "x.alpha", name + ".x", "unet..lora.up.weight"))] = table.pop(name)  # fmt: skip
    return packed(table, random.choice((b"\0", b"\xff", b"\x7f")))


SIZES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}  # fmt: skip


def packed(table: Mapping[str, Any], fill: bytes = b"\0") -> bytes:
    """A safetensors file of those names, dtypes and shapes, one after another, all of one byte."""
    end, made = 0, {}
    for name, one in table.items():
        if not isinstance(one, dict) or not isinstance(one.get("shape"), list):
            made[name] = one
            continue
        count = SIZES.get(str(one.get("dtype")), 4)
        for size in one["shape"]:
            count *= size if isinstance(size, int) and size >= 0 else 0
        count = count if count < 1 << 20 else 0
        made[name] = {**one, "data_offsets": [end, end + count]}
        end += count
    header = json.dumps(made).encode()
    return len(header).to_bytes(8, "little") + header + fill * end
