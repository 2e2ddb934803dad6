"""compare --hooks: what becomes of outputs is judged too, such as boxes after NMS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import api
from sdopt.bundle import Bundle
from sdopt.cli import main
from sdopt.errors import UsageError
from tests.detector import CLASSES, NUMBERS, Detector
from tests.test_adopt import saved

NMS = '''
"""Boxes of a detector: the best first, none that overlaps a better one of its class by half."""

import numpy as np


def preprocess(inputs):
    images = inputs["images"]
    images -= images.min()
    return {"images": images / images.max()}


def overlap(one, others):
    low = np.maximum(one[:2] - one[2:4] / 2, others[:, :2] - others[:, 2:4] / 2)
    high = np.minimum(one[:2] + one[2:4] / 2, others[:, :2] + others[:, 2:4] / 2)
    both = np.clip(high - low, 0, None).prod(1)
    return both / (one[2:4].prod() + others[:, 2:4].prod(1) - both)


def postprocess(outputs):
    kept = []
    for image, boxes in enumerate(outputs["output0"]):
        kinds = boxes[:, 5:].argmax(1)
        scores = boxes[:, 4] * boxes[:, 5:].max(1)
        rows = np.column_stack([np.full(len(boxes), image), boxes[:, :4], scores, kinds])
        left = rows[scores > LEAST]
        left = left[np.argsort(-left[:, 5], kind="stable")]
        while len(left):
            best, left = left[0], left[1:]
            kept.append(best)
            left = left[(overlap(best[1:5], left[:, 1:5]) < 0.5) | (left[:, 6] != best[6])]
    return {"boxes": np.array(kept).reshape(-1, 7)}
'''


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    api.adopt(saved(Detector(17, None), tmp_path / "yolo.onnx"), tmp_path / "bundle")
    api.optimize(tmp_path / "bundle", "@fast")
    return tmp_path / "bundle"


def hooks(folder: Path, text: str = NMS, least: float = 0.3) -> str:
    path = folder / "boxes.py"
    path.write_text(text.replace("LEAST", str(least)))
    return str(path)


def change_head(bundle: Path, by: float) -> None:
    """A planted mistake: the bias of the objectness of every anchor of one level moves."""
    opened = Bundle.open(bundle)
    stage = opened.stage("model", "optimized")
    model = stage.load()
    heads = [
        node
        for node in model.graph
        if node.op_type == "Conv" and node.inputs[2] is not None
        if node.inputs[2].shape == ir.Shape([3 * NUMBERS])
    ]
    assert len(heads) == 3
    bias = heads[0].inputs[2]
    assert bias is not None
    assert bias.const_value is not None
    numbers = bias.const_value.numpy().copy().reshape(3, 5 + CLASSES)
    numbers[:, 4] += by
    bias.const_value = ir.tensor(numbers.reshape(-1), name=bias.name)
    with opened.lock():
        opened.commit(model, stage.record)


def test_boxes_after_nms_are_the_same_and_there_are_some(tmp_path: Path, bundle: Path) -> None:
    found = api.compare(f"{bundle}@model", str(bundle), hooks=hooks(tmp_path))
    (model,) = found.components
    raw, boxes = model.outputs
    assert model.verdict == "same"
    assert (raw.name, boxes.name) == ("output0", "postprocess/boxes")
    assert boxes.shape[0] > 20
    assert boxes.relative_l2 <= (model.allowed or 0)
    assert raw.shape[1] > 2 * boxes.shape[0]


def test_boxes_that_vanish_are_a_difference(tmp_path: Path, bundle: Path) -> None:
    change_head(bundle, -9.0)
    found = api.compare(f"{bundle}@model", str(bundle), hooks=hooks(tmp_path))
    (model,) = found.components
    boxes = model.outputs[1]
    assert model.verdict == "different"
    assert not found.passed
    assert boxes.shape_a is not None
    assert boxes.shape_a[0] > boxes.shape[0]
    assert f"a is [{boxes.shape_a[0]}, 7], b [{boxes.shape[0]}, 7]" in "\n".join(found.lines())
    plain = found.to_json()["components"][0]["outputs"][1]
    assert plain["relative_l2"] is None
    json.dumps(plain)


def test_both_sides_find_nothing(tmp_path: Path, bundle: Path) -> None:
    found = api.compare(f"{bundle}@model", str(bundle), hooks=hooks(tmp_path, least=2))
    assert found.components[0].outputs[1].shape == (0, 7)
    assert found.passed


def test_both_sides_are_fed_what_preprocess_makes(tmp_path: Path, bundle: Path) -> None:
    text = "def preprocess(inputs): return {'images': inputs['images'][:1, :, :64, :96]}"
    found = api.compare(f"{bundle}@model", str(bundle), hooks=hooks(tmp_path, text))
    assert found.components[0].shapes == {"images": (1, 3, 64, 96)}
    assert [one.name for one in found.components[0].outputs] == ["output0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "neither a preprocess nor a postprocess"),
        ("import nothing_of_that_name", "cannot be imported"),
        ("def postprocess(outputs): return outputs['boxes']", "KeyError: 'boxes'"),
        ("def postprocess(outputs): return [1]", "it returned a list"),
        ("def postprocess(outputs): return {'boxes': 'none'}", "no named arrays of numbers"),
        ("def preprocess(inputs): return {}", "not nothing"),
    ],
)
def test_hooks_that_do_not_work_say_why(
    tmp_path: Path, bundle: Path, text: str, words: str
) -> None:
    with pytest.raises(UsageError) as raised:
        api.compare(f"{bundle}@model", str(bundle), hooks=hooks(tmp_path, text))
    assert words in str(raised.value)


def test_a_module_by_its_name(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(hooks(tmp_path)).rename(tmp_path / "my_boxes_after_nms.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = api.compare(f"{bundle}@model", str(bundle), hooks="my_boxes_after_nms")
    assert len(found.components[0].outputs) == 2
    with pytest.raises(UsageError, match="cannot be imported"):
        api.compare(f"{bundle}@model", str(bundle), hooks="no_such_boxes")


def test_the_command_line_adopts_compares_and_takes_sizes(
    tmp_path: Path,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sdopt", *words])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("adopt", str(tmp_path / "yolo.onnx"), "-o", str(bundle)) == 0
    assert capsys.readouterr().out.strip() == str(bundle)
    words = ("compare", f"{bundle}@model", str(bundle), "--hooks", hooks(tmp_path))
    sizes = ("--dim", "batch=1", "--dim", "height=64", "--dim", "width=96", "--json")
    assert run(*words, *sizes) == 0
    (model,) = json.loads(capsys.readouterr().out)["components"]
    assert model["shapes"] == {"images": [1, 3, 64, 96]}
    assert model["outputs"][1]["name"] == "postprocess/boxes"
    assert run(*words, "--dim", "height=64..128") == 2
    change_head(bundle, 9.0)
    assert run(*words) == 1
    assert "postprocess/boxes: a is" in capsys.readouterr().out
    assert np.isfinite(model["outputs"][0]["relative_l2"])
