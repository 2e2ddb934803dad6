"""A bundle whose graphs have the ports of Stable Diffusion and next to no computation.

What the runtime does with graphs is the same for these as for real ones, and they are made and
run in milliseconds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt.bundle import Bundle
from sdopt.manifest import ComponentEntry, StageRecord, Step
from tests.toolkit import model_of

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
WIDTH = 8
ROLES = {
    "text_encoder": "text encoder",
    "unet": "denoiser",
    "vae_encoder": "vae encoder",
    "vae_decoder": "vae decoder",
}

_TEXT_ENCODER = """g (int64[batch_size,sequence_length] input_ids)
    => (float[batch_size,sequence_length,8] last_hidden_state, float[batch_size,8] pooler_output) {
        last_hidden_state = Gather(table, input_ids)
        pooler_output = ReduceMean<keepdims=0>(last_hidden_state, one)
    }"""
_UNET = """g (float[batch_size,4,height,width] sample, float timestep,
           float[batch_size,sequence_length,8] encoder_hidden_states)
    => (float[batch_size,4,height,width] out_sample) {
        c = ReduceMean<keepdims=0>(encoder_hidden_states, one)
        m = MatMul(c, mix)
        w = Unsqueeze(m, last)
        late = Div(timestep, trained)
        s = Add(w, late)
        p = Mul(sample, s)
        out_sample = Tanh(p)
    }"""
_VAE_ENCODER = """g (float[batch_size,3,sample_height,sample_width] sample)
    => (float[batch_size,8,latent_height,latent_width] latent_parameters) {
        latent_parameters = Conv<kernel_shape=[8,8], strides=[8,8]>(sample, kernel)
    }"""
_VAE_DECODER = """g (float[batch_size,4,latent_height,latent_width] latent_sample)
    => (float[batch_size,3,sample_height,sample_width] sample) {
        sample = ConvTranspose<kernel_shape=[8,8], strides=[8,8]>(latent_sample, kernel)
    }"""


def graphs() -> dict[str, ir.Model]:
    """The graph of every component."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / 4

    vocabulary = len(json.loads((DIGITS / "tokenizer" / "vocab.json").read_text()))
    return {
        "text_encoder": model_of(
            _TEXT_ENCODER, {"table": weight(vocabulary, WIDTH), "one": np.array([1])}
        ),
        "unet": model_of(
            _UNET,
            {
                "mix": weight(WIDTH, 4),
                "one": np.array([1]),
                "last": np.array([2, 3]),
                "trained": np.array(1000, np.float32),
            },
        ),
        "vae_encoder": model_of(_VAE_ENCODER, {"kernel": weight(8, 3, 8, 8)}),
        "vae_decoder": model_of(_VAE_DECODER, {"kernel": weight(4, 3, 8, 8)}),
    }


def record(component: str, stage: str = "model", **others: object) -> StageRecord:
    """A record as export would write it."""
    given: dict[str, object] = {
        "component": component,
        "role": ROLES[component],
        "stage": stage,
        "source_stage": "",
        "source": "checkpoint",
        "origin": "toy",
        "family": "sd1",
        "dtype": "float32",
        "key": stage,
        **others,
    }
    return StageRecord(**given)  # type: ignore[arg-type]


def bundle(path: Path, without: tuple[str, ...] = ()) -> Bundle:
    """A bundle of the toy graphs with the tokenizer and scheduler of examples/digits."""
    models = {name: model for name, model in graphs().items() if name not in without}
    made = Bundle.create(
        path,
        "toy",
        "sd1",
        {name: ComponentEntry(name, ROLES[name]) for name in models},
        by="tests",
    )
    with made.lock():
        for name, model in models.items():
            made.commit(model, record(name))
    made.write_manifest()
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(DIGITS / part, path / part)
    shutil.copy(DIGITS / "model_index.json", path)
    configs = {
        "text_encoder": DIGITS / "text_encoder",
        "unet": DIGITS / "unet",
        "vae_encoder": DIGITS / "vae",
        "vae_decoder": DIGITS / "vae",
    }
    for name in models:
        shutil.copy(configs[name] / "config.json", path / name)
    return made


def restage(
    made: Bundle, component: str, stage: str, history: tuple[Step, ...] = (), **others: object
) -> None:
    """Commit a component's raw graph as another stage that came from it."""
    raw = made.stage(component, "model")
    with made.lock():
        made.commit(
            raw.load(),
            record(
                component,
                stage,
                history=history,
                **{"source_stage": "model", "source": raw.digest, **others},
            ),
        )
