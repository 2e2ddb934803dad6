"""Paths that users give stay below the root; uploads arrive whole, under names of their own."""

from __future__ import annotations

import os
import shutil
import stat
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from examples.digits import single_file
from sdopt.errors import PathError, SdoptError, SourceError, UsageError, WeightsError
from sdopt.ui import names, storing
from sdopt.ui.listing import Source
from sdopt.ui.workspace import Workspace
from tests.exporters.test_checkpoint import floats, table, write
from tests.test_bundle import make_bundle

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits"

ESCAPES = [
    "",
    " ",
    "/etc/passwd",
    "//etc/passwd",
    "~/secret",
    "~root",
    "..",
    "../outside/secret",
    "models/../../outside/secret",
    "models/..",
    "models/./real.txt",
    "./models",
    "models//real.txt",
    "..\\outside",
    "models\\real.txt",
    "C:\\secret",
    "models/real.txt\0.png",
    "models/real\n.txt",
    "models/\x1b[31m",
    "models/\u202etxt.laer",
    "models/\ud800",
    ".sdopt-ui/lock",
    ".sdopt-ui",
    "models/.hidden",
    "bundle/.jobs/1/log.txt",
    "out",
    "out/secret",
    "chain",
    "loop",
    "to_hidden/lock",
    "with_link",
    "models/real.txt/more",
    "org/name",
    "org/name@main",
    "x" * 300,
    "/".join(["x"] * 600),
    "https://example.com/model.safetensors",
    "file:///etc/passwd",
    "models/real.txt/../real.txt",
    "%2e%2e/outside/secret",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with links of every kind in it, beside a folder that nobody may see."""
    base = tmp_path_factory.mktemp("work")
    made, outside = base / "root", base / "outside"
    for folder in (made / "models", made / "with_link" / "deep", outside):
        folder.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    (made / "models" / "real.txt").write_text("real")
    (made / "models" / ".hidden").write_text("hidden")
    (made / "out").symlink_to(outside)
    (made / "chain").symlink_to("out/secret")
    (made / "loop").symlink_to("loop")
    (made / "inner").symlink_to("models")
    (made / "to_hidden").symlink_to(".sdopt-ui")
    (made / "with_link" / "deep" / "weights.safetensors").symlink_to(outside / "secret")
    return made


@pytest.fixture(scope="module")
def workspace(root: Path) -> Workspace:
    return Workspace(root)


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_what_leads_out_is_refused_with_a_hint(workspace: Workspace, name: str) -> None:
    with pytest.raises(PathError) as caught:
        workspace.resolve(name)
    assert caught.value.hint
    assert caught.value.where is None or caught.value.where.isprintable()
    assert "secret" not in (caught.value.why or "")


_HOSTILE = ("..", ".", "", "~", "\\", "\0", "%2e%2e", "C:", ".sdopt-ui", "lock", "outside")
_THERE = (
    "models",
    "real.txt",
    "out",
    "secret",
    "chain",
    "loop",
    "inner",
    "with_link",
    "to_hidden",
)
_PIECES = st.sampled_from((*_HOSTILE, *_THERE))


@given(st.one_of(st.text(max_size=40), st.lists(_PIECES, max_size=6).map("/".join)))
@example("inner/real.txt")
@example("/")
def test_whatever_is_given_what_comes_is_below_the_root(workspace: Workspace, name: str) -> None:
    try:
        found = workspace.resolve(name)
    except PathError:
        return
    assert found.is_relative_to(workspace.root)
    assert found == found.resolve(strict=True) != workspace.root
    assert not any(part.startswith(".") for part in found.relative_to(workspace.root).parts)
    assert workspace.resolve(workspace.relative(found)) == found


def test_a_link_that_stays_inside_is_followed(workspace: Workspace, root: Path) -> None:
    assert workspace.resolve("inner/real.txt") == workspace.root / "models" / "real.txt"
    assert workspace.relative(root / "inner" / "real.txt") == "models/real.txt"
    for outside in (root, root.parent / "outside" / "secret", root / "out" / "secret"):
        with pytest.raises(PathError):
            workspace.relative(outside)


def test_a_root_that_is_a_link_is_its_target(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert Workspace(tmp_path / "link").resolve("models/real.txt").is_file()
    with pytest.raises(UsageError, match="no such folder"):
        Workspace(tmp_path / "nowhere")


def test_the_servers_own_folder_must_be_no_link(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / ".sdopt-ui").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PathError, match="link"):
        Workspace(tmp_path / "root")


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/a", ".a", "-a", "a b", "ä", "a\n", "a.", "x" * 101, "uploads"]
)
def test_what_is_written_has_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(PathError):
        Workspace(tmp_path).new_bundle(name)


def test_a_new_bundle_takes_nobodys_place(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.new_bundle("new") == tmp_path / "new"
    make_bundle(tmp_path / "known")
    assert workspace.new_bundle("known") == tmp_path / "known"
    (tmp_path / "queued" / ".jobs").mkdir(parents=True)
    assert workspace.new_bundle("queued") == tmp_path / "queued"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    (tmp_path / "link").symlink_to(tmp_path / "known")
    (tmp_path / "file").touch()
    for taken in ("photos", "link", "file"):
        with pytest.raises(PathError, match="taken"):
            workspace.new_bundle(taken)


@given(st.text(max_size=130))
@example("model.safetensors")
@example("uploads")
@example("../../x")
def test_a_fresh_name_can_be_written(workspace: Workspace, stem: str) -> None:
    name = workspace.fresh_name(stem)
    assert not (workspace.root / name).exists()
    assert workspace.new_bundle(name).parent == workspace.root
    assert names.plain(names.made_plain(stem)) == names.made_plain(stem)


def test_fresh_names_count_on(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.fresh_name("v1-5 pruned (1).safetensors") == "v1-5_pruned_1_"[:-1]
    for expected in ("model", "model-2", "model-3"):
        assert workspace.fresh_name("model.safetensors") == expected
        (tmp_path / expected).mkdir()


def _sent(workspace: Workspace, name: str, count: int = 4) -> Path:
    """A file as gradio leaves it: under its own name, in a folder named by a digest."""
    folder = workspace.incoming / f"digest-{len(os.listdir(workspace.incoming))}"
    folder.mkdir()
    write(folder / name, table(a=[count]), floats(count))
    return folder / name


def test_an_upload_is_moved_and_not_copied(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    upload = _sent(workspace, "m.safetensors")
    inode = upload.stat().st_ino
    kept = workspace.take(upload, "../../My model.safetensors")
    assert kept == tmp_path / "uploads" / "My_model.safetensors"
    assert kept.stat().st_ino == inode
    assert not upload.exists()


def test_nothing_is_overwritten_and_the_same_is_kept_once(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = workspace.take(_sent(workspace, "m.safetensors", 4), "m.safetensors")
    before = first.read_bytes()
    again = workspace.take(_sent(workspace, "m.safetensors", 4), "m.safetensors")
    other = workspace.take(_sent(workspace, "m.safetensors", 5), "m.safetensors")
    assert (again, other.name) == (first, "m-2.safetensors")
    assert first.read_bytes() == before
    (tmp_path / "uploads" / "n.safetensors").symlink_to(tmp_path / "target")
    linked = workspace.take(_sent(workspace, "n.safetensors", 4), "n.safetensors")
    assert linked.name == "n-2.safetensors"
    assert not (tmp_path / "target").exists()


def test_what_is_no_model_is_not_taken(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    good = _sent(workspace, "m.safetensors")
    for name in ("m.ckpt", "m", "m.safetensors.exe", ".safetensors", ""):
        with pytest.raises(SourceError):
            workspace.take(good, name)
    broken = _sent(workspace, "b.safetensors")
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(WeightsError):
        workspace.take(broken, "b.safetensors")
    page = _sent(workspace, "p.safetensors")
    page.write_bytes(b"<!DOCTYPE html><title>log in</title>" * 4)
    with pytest.raises(WeightsError, match="web page"):
        workspace.take(page, "p.safetensors")
    assert not (tmp_path / "uploads").exists()


def test_only_what_a_browser_sent_is_taken(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    mine = tmp_path / "mine.safetensors"
    write(mine, table(a=[4]), floats(4))
    (workspace.incoming / "link.safetensors").symlink_to(mine)
    for path in (mine, workspace.incoming / "link.safetensors", workspace.incoming / "../../mine"):
        with pytest.raises(PathError):
            workspace.take(path, "m.safetensors")
    assert mine.exists()
    (tmp_path / "uploads").symlink_to(tmp_path.parent)
    with pytest.raises(PathError, match="link"):
        workspace.take(_sent(workspace, "m.safetensors"), "m.safetensors")


def test_pictures_decode_and_are_not_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    good = workspace.incoming / "a.png"
    Image.new("RGB", (30, 20)).save(good)
    assert workspace.picture(good) == good
    bad = workspace.incoming / "b.png"
    bad.write_bytes(good.read_bytes()[:45])
    gif = workspace.incoming / "c.gif"
    Image.new("RGB", (30, 20)).save(gif)
    for path in (bad, gif):
        with pytest.raises(UsageError, match="no image"):
            workspace.picture(path)
    monkeypatch.setattr(storing, "MOST_PIXELS", 599)
    with pytest.raises(UsageError, match="30x20"):
        workspace.picture(good)
    # A bomb: few bytes that say that they are a gigapixel.
    bomb = workspace.incoming / "d.png"
    Image.new("1", (12_000, 12_000)).save(bomb)
    monkeypatch.setattr(storing, "MOST_PIXELS", 64_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match="12000x12000"):
            workspace.picture(bomb)


def test_an_archive_holds_the_bundles_own_names(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    bundle = tmp_path / "made" / "b"
    bundle.parent.mkdir()
    make_bundle(bundle)
    (bundle / ".jobs").mkdir()
    (bundle / ".jobs" / "log.txt").write_text("private")
    (bundle / "unet" / "more").mkdir()
    (bundle / "unet" / "more" / "engine.plan").write_bytes(b"engine")
    made = workspace.zipped([bundle / "unet", bundle / "manifest.json"], "my b/../engine.zip")
    assert made == workspace.outgoing / "engine.zip"
    with zipfile.ZipFile(made) as archive:
        found = archive.namelist()
        assert {"manifest.json", "unet/model.onnx", "unet/more/engine.plan"} <= set(found)
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert not [name for name in found if name.startswith(("/", ".")) or ".." in name]
    assert os.listdir(workspace.outgoing) == ["engine.zip"]


def test_an_archive_is_of_one_bundle_and_of_nothing_outside(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for name in ("a", "b"):
        make_bundle(tmp_path / name)
    (tmp_path / "plain").mkdir()
    (tmp_path / "a" / "out").symlink_to("/etc")
    for paths in (
        [tmp_path / "a" / "unet", tmp_path / "b" / "unet"],
        [tmp_path / "plain"],
        [tmp_path / "a" / "unet", tmp_path / "plain"],
        [Path("/etc/passwd")],
        [tmp_path / "a" / "out" / "passwd"],
        [tmp_path / "a"],  # it holds a link out
        [tmp_path / "a" / "unet" / ".." / ".." / ".sdopt-ui"],
        [],
    ):
        with pytest.raises(PathError):
            workspace.zipped(paths, "x")
    assert not os.listdir(workspace.outgoing)


def test_a_jobs_image_is_shown_as_a_copy(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    image = tmp_path / "b" / ".jobs" / "1" / "0000.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"one")
    copy = workspace.shown(image)
    assert (copy.name, copy.read_bytes()) == ("0000.png", b"one")
    assert copy.is_relative_to(workspace.incoming)
    assert workspace.shown(image) == copy
    image.write_bytes(b"another")
    assert workspace.shown(image).read_bytes() == b"another"
    (tmp_path / "out.png").symlink_to("/etc/passwd")
    (tmp_path / ".sdopt-ui" / "lock").touch()
    for path in (tmp_path / "out.png", Path("/etc/passwd"), tmp_path / ".sdopt-ui" / "lock"):
        with pytest.raises(PathError):
            workspace.shown(path)
    with pytest.raises(PathError):
        workspace.shown(tmp_path / "b")


def test_old_uploads_are_swept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    old, new = _sent(workspace, "old.safetensors"), _sent(workspace, "new.safetensors")
    os.utime(old, (1, 1))
    (workspace.incoming / "link").symlink_to("/etc/passwd")
    assert workspace.sweep() == 1
    assert (old.parent.exists(), new.exists()) == (False, True)
    assert workspace.sweep(0.0) == 2
    assert os.listdir(workspace.incoming) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Models of several kinds below a root, and things that are none."""
    root = tmp_path_factory.mktemp("models")
    (root / "far").mkdir()
    single_file.write(DIGITS, root / "far" / "digits.safetensors")
    shutil.copytree(DIGITS, root / "digits", ignore=shutil.ignore_patterns("*.py", "*.md"))
    shutil.copytree(root / "digits", root / "half", ignore=shutil.ignore_patterns("vae"))
    make_bundle(root / "bundle")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {f"{layer}.lora_down.weight": [3, 8], f"{layer}.lora_up.weight": [8, 3]}
    write(root / "lora.safetensors", table(**factors), floats(48))
    write(root / "strange.safetensors", table(a=[4]), floats(4))
    write(root / "broken.safetensors", table(a=[4]), floats(3))
    (root / "digits.ckpt").touch()
    (root / ".hidden").mkdir()
    shutil.copy(root / "lora.safetensors", root / ".hidden")
    (root / "link.safetensors").symlink_to(root / "lora.safetensors")
    (root / "locked").mkdir()
    return Workspace(root)


def test_sources_say_what_they_are_and_lack(models: Workspace) -> None:
    found = {one.name: one for one in models.sources()}
    assert list(found) == [
        "broken.safetensors",
        "digits",
        "far/digits.safetensors",
        "half",
        "strange.safetensors",
    ]
    file, folder, half = found["far/digits.safetensors"], found["digits"], found["half"]
    assert (file.kind, file.family, file.missing, file.error) == ("file", "sd1", (), None)
    assert file.size_bytes == (models.root / file.name).stat().st_size
    assert (folder.kind, folder.family, folder.missing) == ("folder", "sd1", ())
    assert set(folder.components) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert folder.size_bytes > half.size_bytes > 0
    assert half.missing == ("vae",)
    assert "not a usable weights file" in (found["broken.safetensors"].error or "")
    assert "no checkpoint of a known family" in (found["strange.safetensors"].error or "")
    assert models.describe("half") == half


def test_bundles_and_adapters_are_listed_apart(models: Workspace) -> None:
    (bundle,) = models.bundles()
    assert (bundle.name, bundle.components, bundle.error) == ("bundle", ("unet",), None)
    (adapter,) = models.adapters()
    assert (adapter.name, adapter.layers, adapter.rank) == ("lora.safetensors", 1, 3)
    assert adapter.parts == ("denoiser",)


def test_headers_are_read_once(models: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = models.sources()
    opened: list[str] = []

    def refuse(path: str) -> None:
        opened.append(path)
        raise SourceError("opened again")

    monkeypatch.setattr("sdopt.ui.listing.open_source", refuse)
    files = [one for one in models.sources() if one.kind == "file"]
    assert files == [one for one in before if one.kind == "file"]
    assert not [path for path in opened if path.endswith(".safetensors")]


def test_what_cannot_be_read_is_listed_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mine.safetensors", table(a=[4]), floats(4))
    workspace = Workspace(tmp_path)

    def refused(_: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sdopt.ui.listing.open_source", refused)
    (found,) = workspace.sources()
    assert (found.name, found.error) == ("mine.safetensors", "Permission denied")
    gone = workspace.root / "gone.safetensors"
    assert workspace._listing.source(gone) == Source(
        gone.name, "file", 0, error="the file is gone"
    )


def test_a_folder_with_a_link_out_is_an_error_and_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "root" / "model" / "unet").mkdir(parents=True)
    (tmp_path / "outside").write_text("{}")
    (tmp_path / "root" / "model" / "model_index.json").write_text("{}")
    (tmp_path / "root" / "model" / "unet" / "config.json").symlink_to(tmp_path / "outside")
    (found,) = Workspace(tmp_path / "root").sources()
    assert found == Source("model", "folder", 0, error=found.error)
    assert "leads out" in (found.error or "")


def test_what_the_server_writes_is_its_own(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for folder in (workspace.incoming, workspace.outgoing):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_errors_are_of_the_kind_that_has_no_traceback() -> None:
    assert issubclass(PathError, SdoptError)
