"""Sources on the Hub, against a small server of our own on 127.0.0.1 through HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sdopt.errors import SourceError
from sdopt.exporters import DiffusersSource
from sdopt.exporters.hub import resolve, select

COMMIT = "a" * 40
REPO = "someone/tiny-sd"
PICKLES = ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin")
EXTRA = (
    *PICKLES,
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "unet/model.onnx",
    "vae/diffusion_pytorch_model.non_ema.safetensors",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
)


class Hub(ThreadingHTTPServer):
    """The endpoints that huggingface_hub 2.4 asks for, serving ``files`` as one repository.

    Attributes:
        breaks: how often to break off half-way through each safetensors file.
        requests: method, path and Range header of everything asked for.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.breaks = 0
        self.broken: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> set[str]:
        """The files of which a body was sent."""
        gets = [path for method, path, _ in self.requests if method == "GET"]
        found = (re.search(f"/resolve/{COMMIT}/(.*)", path) for path in gets)
        return {match[1] for match in found if match}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers["Range"]))
        if path.startswith("/api/models/gated/"):
            return self._fail(403, "GatedRepo")
        if not path.startswith((f"/api/models/{REPO}", f"/{REPO}/resolve/{COMMIT}/")):
            return self._fail(404, "RepoNotFound")
        if "/revision/" in path and path.rpartition("/")[2] not in (COMMIT, "main", "v1"):
            return self._fail(404, "RevisionNotFound")
        if "/tree/" in path:
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                    for name, data in self.server.files.items()
                ]
            )
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self._json({"id": REPO, "sha": COMMIT, "siblings": siblings})
        return self._file(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"), body)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, name: str, body: bool) -> None:
        data = self.server.files[name]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        self.send_header("ETag", f'"{_digest(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        done = self.server.broken.get(name, 0)
        if name.endswith(".safetensors") and done < self.server.breaks:
            self.server.broken[name] = done + 1
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[start:])


def _digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(pipeline: Path, pipeline_fp16: Path) -> Iterator[Hub]:
    """A repository with both dtypes and with much that no export needs."""
    files = dict.fromkeys(EXTRA, b"not needed")
    for folder, variant in ((pipeline, ""), (pipeline_fp16, ".fp16")):
        for path in folder.rglob("*"):
            if path.is_file():
                name = path.relative_to(folder).with_name(f"{path.stem}{variant}{path.suffix}")
                if not variant or path.suffix == ".safetensors":
                    files[name.as_posix()] = path.read_bytes()
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CODE = """
import sys, json
from sdopt.errors import SdoptError
from sdopt.exporters import resolve
try:
    print(json.dumps({"folder": str(resolve(*sys.argv[1:]))}))
except SdoptError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


def ask(endpoint: str, cache: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """What ``resolve`` answers in a process of its own, since HF_ENDPOINT is read at import."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={
            **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DOWNLOAD_TIMEOUT": "10",
            **environment,
        },
    )
    assert "Traceback" not in done.stderr, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_just_the_needed_files(hub: Hub, tmp_path: Path) -> None:
    folder = Path(ask(hub.endpoint, tmp_path, REPO)["folder"])
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == hub.fetched()
    assert names == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    source = DiffusersSource(folder)
    assert source.component_names() == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    assert source.dtype_of("unet") == "fp32"
    for name in source.component_names():
        source.fingerprint(name)


def test_second_time_fetches_nothing_and_works_offline(hub: Hub, tmp_path: Path) -> None:
    first = ask(hub.endpoint, tmp_path, f"{REPO}@v1")
    hub.requests.clear()
    assert ask(hub.endpoint, tmp_path, f"{REPO}@v1") == first
    assert hub.fetched() == set()
    hub.requests.clear()
    offline = ask(hub.endpoint, tmp_path, f"{REPO}@{COMMIT}", HF_HUB_OFFLINE="1")
    assert offline == first
    assert hub.requests == []


def test_fp16_variant(hub: Hub, tmp_path: Path) -> None:
    folder = Path(ask(hub.endpoint, tmp_path, REPO, "fp16")["folder"])
    weights = {p.name for p in folder.rglob("*.safetensors")}
    assert weights == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    assert DiffusersSource(folder).dtype_of("unet") == "fp16"


def test_broken_off_download_is_resumed(hub: Hub, tmp_path: Path) -> None:
    path = "unet/diffusion_pytorch_model.safetensors"
    chunk = 10 << 20  # huggingface_hub keeps what came in whole chunks of this
    hub.files[path] = os.urandom(5 * chunk // 2)
    hub.breaks = 1
    folder = Path(ask(hub.endpoint, tmp_path, REPO)["folder"])
    assert (folder / path).read_bytes() == hub.files[path]
    ranges = [span for method, name, span in hub.requests if method == "GET" and path in name]
    assert ranges == [None, f"bytes={chunk}-"]


def test_given_up_download_goes_on_with_the_rest(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = 10**6  # every safetensors file breaks off, whatever is tried
    answer = ask(hub.endpoint, tmp_path, REPO)
    assert answer["error"] == "SourceError"
    assert "broke off" in answer["text"]
    assert "try again" in answer["text"]
    done = {name for name in hub.fetched() if not name.endswith(".safetensors")}
    hub.breaks = 0
    hub.requests.clear()
    folder = Path(ask(hub.endpoint, tmp_path, REPO)["folder"])
    assert done
    assert not done & hub.fetched()
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == hub.files[path.relative_to(folder).as_posix()]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("someone/absent", "no such model on the Hub"),
        ("gated/model", "gated"),
        (f"{REPO}@nowhere", "no revision nowhere"),
    ],
)
def test_refusals(hub: Hub, tmp_path: Path, source: str, words: str) -> None:
    answer = ask(hub.endpoint, tmp_path, source)
    assert answer["error"] == "SourceError"
    assert words in answer["text"]
    assert "try:" in answer["text"]
    assert source.partition("@")[0] in answer["text"]


def test_nobody_answers(tmp_path: Path) -> None:
    answer = ask("http://127.0.0.1:9", tmp_path, REPO)
    assert answer["error"] == "SourceError"
    assert "cannot be reached" in answer["text"]
    assert "127.0.0.1:9" in answer["text"]
    assert "local folder" in answer["text"]


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    answer = ask("http://127.0.0.1:9", tmp_path, REPO, HF_HUB_OFFLINE="1")
    assert answer["error"] == "SourceError"
    assert "not in the local cache" in answer["text"]
    assert "HF_HUB_OFFLINE is set" in answer["text"]


def test_pickles_on_the_hub() -> None:
    files = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"]
    with pytest.raises(SourceError, match="pickled"):
        select(files)


def test_shards_of_one_variant() -> None:
    stem = "unet/diffusion_pytorch_model"
    plain = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = [
        "unet/config.json",
        *plain,
        *half,
        f"{stem}.safetensors.index.json",
        f"{stem}.safetensors.index.fp16.json",
    ]
    assert set(select(files)) == {files[0], *plain, f"{stem}.safetensors.index.json"}
    assert set(select(files, "fp16")) == {files[0], *half, f"{stem}.safetensors.index.fp16.json"}
    older = [
        name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors") for name in half
    ]
    chosen = select([*files[:3], *older, *files[5:]], "fp16")
    assert set(chosen) == {files[0], *older, f"{stem}.safetensors.index.fp16.json"}


def test_components_asked_for() -> None:
    files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert select(files, components=["unet"]) == files[:3]


def test_repository_of_one_component() -> None:
    files = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert select(files) == files[1:]


def test_local_sources(tmp_path: Path, pipeline: Path) -> None:
    assert resolve(str(pipeline)) == pipeline
    for name in (str(tmp_path / "absent"), "./absent/folder", "a/b/c", "plain", ""):
        with pytest.raises(SourceError, match="no such folder"):
            resolve(name)
