"""The server as it is started: who may ask, what is served, what an upload and idling cost."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sdopt.cli import main
from sdopt.errors import MissingDependencyError, UsageError
from sdopt.ui import Settings, guard, serve, serving
from sdopt.ui.passwords import DELAY_SECONDS, GUESSES, REFUSED_SECONDS, Account, Guesses
from tests.browser import browsing
from tests.exporters.test_checkpoint import floats, table, write
from tests.ui import served
from tests.ui.served import Served

PASSWORD = "correct horse"
UPLOAD_BYTES = 1_500_000_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("root")
    (made / "password").write_text(PASSWORD + "\n")
    (made / "password").chmod(0o600)
    write(made / "model.safetensors", table(a=[4]), floats(4))
    (made / "b" / ".jobs" / "1").mkdir(parents=True)
    (made / "b" / ".jobs" / "1" / "log.txt").write_text("private")
    return made


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Served]:
    with served.serving(root, max_upload_bytes=2 * 10**9) as one:
        yield one
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(20) == 0
        assert (root / "closed").exists()


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as one:
        yield one


def take(client: httpx.Client, value: Any) -> str:
    """What the page's function says of an upload."""
    given = client.post("gradio_api/call/take", json={"data": [value]})
    if given.status_code != 200:
        return f"{given.status_code}"
    told = client.get(f"gradio_api/call/take/{given.json()['event_id']}").text
    return told.split("data: ")[-1].strip()


def file_data(path: object) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


# What is asked, and by whom


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1:{port}", "[::1]:1", "127.0.0.1"])
def test_it_answers_to_loopback_names(client: httpx.Client, server: Served, host: str) -> None:
    assert client.get("/", headers={"Host": host.format(port=server.port)}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "localhost@evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "[::1",
        "",
    ],
)
def test_and_to_no_other(client: httpx.Client, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://localhost:{port}"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
    ],
)
def test_only_this_page_may_post(
    client: httpx.Client, server: Served, headers: dict[str, str], code: int
) -> None:
    given = {name: value.format(port=server.port) for name, value in headers.items()}
    body = {"data": [None]}
    assert client.post("gradio_api/call/take", json=body, headers=given).status_code == code


def test_another_page_may_lead_here_and_may_not_embed(client: httpx.Client) -> None:
    led = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    found = client.get("/", headers=led)
    assert found.status_code == 200
    assert "frame-ancestors 'self'" in found.headers["Content-Security-Policy"]
    assert client.get("/", headers={**led, "Sec-Fetch-Mode": "no-cors"}).status_code == 403


def test_others_need_a_password_and_ctrl_c_ends_it(root: Path, tmp_path: Path) -> None:
    left = tmp_path / ".sdopt-ui" / "incoming" / "x" / "left"
    left.parent.mkdir(parents=True)
    left.touch()
    settings = {"host": "0.0.0.0", "auth": f"me:{root / 'password'}", "names": ["models.example"]}
    with served.serving(tmp_path, **settings) as one:
        assert (tmp_path / "started").exists()
        assert not left.parent.exists()
        lock = tmp_path / ".sdopt-ui" / "lock"
        assert json.loads(lock.read_text())["address"] == one.address
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        address = one.address.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            _check_password(client)
            right = {"Authorization": guard.basic("me", PASSWORD)}
            with client.stream("GET", "gradio_api/heartbeat/abc", headers=right) as stream:
                assert next(stream.iter_text()).startswith("data: ALIVE")
                one.process.send_signal(signal.SIGINT)
                assert one.process.wait(20) == 0
        out, err = one.process.communicate()
    assert (out, err) == ("stopped\n", "")
    assert (tmp_path / "closed").exists()
    assert lock.read_text() == ""


def _check_password(client: httpx.Client) -> None:
    for path in ("/", "config", "theme.css", "files/x.zip", "gradio_api/upload_progress"):
        found = client.get(path)
        assert (found.status_code, path) == (401, path)
        assert found.headers["WWW-Authenticate"].startswith("Basic")
    for path in ("gradio_api/upload", "gradio_api/call/take", "login", "gradio_api/cancel"):
        assert client.post(path, json={}).status_code == 401
    right = {"Authorization": guard.basic("me", PASSWORD)}
    assert client.get("config", headers=right).json()["username"] == "me"
    for host, code in (("models.example", 200), ("10.0.0.1:80", 200), ("evil.example", 421)):
        assert client.get("config", headers={**right, "Host": host}).status_code == code
    began = time.monotonic()
    wrong = {"Authorization": guard.basic("me", "wrong horse")}
    assert client.get("config", headers=wrong).status_code == 401
    assert time.monotonic() - began >= DELAY_SECONDS


def test_guesses_end(tmp_path: Path) -> None:
    now = [0.0]
    guesses = Guesses(lambda: now[0])
    for _ in range(GUESSES):
        assert not guesses.is_refused("10.0.0.1")
        guesses.wrong("10.0.0.1")
    assert guesses.is_refused("10.0.0.1")
    assert not guesses.is_refused("10.0.0.2")
    now[0] = REFUSED_SECONDS + 1
    assert not guesses.is_refused("10.0.0.1")
    for last in range(GUESSES):
        guesses.wrong(f"2001:db8::{last}")
    assert guesses.is_refused("2001:db8::ffff")
    guesses.right("2001:db8::1")
    assert not guesses.is_refused("2001:db8::ffff")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Basic",
        "Basic !!!",
        "Basic bWU=",
        "Basic " + "A" * 9,
        guard.basic("me", PASSWORD).replace("Basic", "Bearer"),
        guard.basic("me", PASSWORD + "x"),
        guard.basic("me", PASSWORD[:-1]),
        guard.basic("me", ""),
        guard.basic("you", PASSWORD),
        guard.basic("", ""),
    ],
)
def test_only_the_password_is_the_password(root: Path, header: str) -> None:
    account = Account.read(f"me:{root / 'password'}")
    assert not account.accepts(header)
    assert account.accepts(guard.basic("me", PASSWORD))
    assert PASSWORD not in repr(account)


# What is started


def test_a_password_file_is_for_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "password"
    for text in ("me", "me:", ":x", f"me:{file}"):
        with pytest.raises(UsageError):
            Account.read(text)
    file.write_text(PASSWORD)
    for mode in (0o604, 0o640, 0o666):
        file.chmod(mode)
        with pytest.raises(UsageError, match="others can read") as caught:
            Account.read(f"me:{file}")
        assert caught.value.hint == f"chmod 600 {file}"
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(UsageError, match="too short"):
        Account.read(f"me:{file}")


def test_the_commands_options_become_settings(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Settings] = []
    opened: list[str] = []

    def fake(settings: Settings, started: Callable[[str], None]) -> None:
        given.append(settings)
        started("http://host:1/")

    monkeypatch.setattr("sdopt.ui.serve", fake)
    monkeypatch.setattr("webbrowser.open", opened.append)
    words = ["--root", str(root), "--host", "::", "--port", "0", "--auth", "me:x", "--open"]
    words += ["--max-upload", "2 gb", "--allow-private-urls", "--name", "a.example"]
    monkeypatch.setattr("sys.argv", ["sdopt", "ui", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (None, 0)
    assert given == [Settings(root, "::", 0, "me:x", 2 * 10**9, True, ("a.example",))]
    assert opened == ["http://host:1/"]
    out, err = capsys.readouterr()
    assert out == "http://host:1/\n"
    assert "not encrypted" in err
    monkeypatch.setattr("sys.argv", ["sdopt", "ui", "--max-upload", "123"])
    with pytest.raises(SystemExit):
        main()
    assert given[1] == Settings(Path(), max_upload_bytes=123)
    assert "not encrypted" not in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.example", ""])
def test_others_are_not_served_without_a_password(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="no password") as caught:
        serve(Settings(tmp_path, host=host))
    assert "--auth USER:PASSWORD-FILE" in (caught.value.hint or "")
    assert os.listdir(tmp_path) == []


def test_a_port_in_use_is_said(server: Served, root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"port {server.port}") as caught:
        serve(Settings(tmp_path, port=server.port))
    assert "in use" in (caught.value.why or "")
    with pytest.raises(UsageError, match="no address"):
        serve(Settings(tmp_path, host="nowhere.invalid", auth=f"me:{root / 'password'}"))


def test_a_root_has_one_server(server: Served, root: Path) -> None:
    with pytest.raises(UsageError, match="another sdopt ui") as caught:
        serve(Settings(root, port=0))
    assert server.address in (caught.value.why or "")
    assert httpx.get(server.address, trust_env=False).status_code == 200


def test_without_gradio_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError) as caught:
        serve(Settings(tmp_path))
    assert caught.value.hint == 'pip install "sdopt[ui]"'


# What is served


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{root}/password",
        "{root}/model.safetensors",
        "{root}/b/.jobs/1/log.txt",
        "{root}/.sdopt-ui/lock",
        "{root}/.sdopt-ui/incoming/../lock",
        "{root}/.sdopt-ui/incoming/%2e%2e/lock",
        "{root}/.sdopt-ui/incoming/out",
        "{root}/.sdopt-ui/incoming",
        "../../../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "....//etc/passwd",
        "pyproject.toml",
        "./pyproject.toml",
        "{repository}/pyproject.toml",
        "~/.bashrc",
        "http://127.0.0.1:1/x",
        "https://example.com/",
        "HTTPS://example.com/",
        "file:///etc/passwd",
        "//etc/passwd",
        "/proc/self/environ",
        "",
    ],
)
def test_no_file_is_served_but_uploads(client: httpx.Client, root: Path, path: str) -> None:
    (link := root / ".sdopt-ui" / "incoming" / "out").unlink(missing_ok=True)
    link.symlink_to("/etc/passwd")
    path = path.format(root=root, repository=served.REPOSITORY)
    for start in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/files/", "/static/"):
        found = _raw(client, start + path)
        assert found in (b"400", b"403", b"404"), (start, found)
    assert take(client, file_data(path)) == "403"
    assert take(client, {"path": path}) == "403"
    assert take(client, {"deep": [file_data(path)]}) == "403"
    link.unlink()


def _raw(client: httpx.Client, path: str) -> bytes:
    """The code that a path is answered with, sent as it stands."""
    return _answer(client, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")


def _answer(client: httpx.Client, head: str) -> bytes:
    place = client.base_url.host, client.base_url.port or 80
    with socket.create_connection(place) as one, one.makefile("rb") as file:
        one.sendall(f"{head}\r\n".encode())
        return file.readline().split()[1]


@pytest.mark.parametrize(
    "path",
    [
        "docs",
        "redoc",
        "openapi.json",
        "monitoring/summary",
        "gradio_api/openapi.json",
        "gradio_api/runs",
        "gradio_api/mcp/sse",
        "gradio_api/vibe-code",
        "gradio_api/deep_link",
        "gradio_api/proxy=https://x.hf.space/",
        "files/%2e%2e%2flock",
    ],
)
def test_what_the_page_does_not_need_is_not_there(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_archives_are_handed_out_by_name(client: httpx.Client, root: Path) -> None:
    folder = root / ".sdopt-ui" / "outgoing"
    (folder / "engine.zip").write_bytes(b"zip")
    (folder / "out.zip").symlink_to("/etc/passwd")
    found = client.get("files/engine.zip")
    assert (found.status_code, found.content) == (200, b"zip")
    assert found.headers["Content-Disposition"] == 'attachment; filename="engine.zip"'
    assert client.get("files/out.zip").status_code == 404


def test_a_request_that_is_no_upload_is_small(client: httpx.Client) -> None:
    body = b"[" * (guard.MAX_BODY_BYTES + 1)
    assert client.post("gradio_api/call/take", content=body).status_code == 413
    assert client.post("gradio_api/call/take", content=iter([body])).status_code == 413
    nested = b"[" * 100_000
    kind = {"Content-Type": "application/json"}
    assert client.post("gradio_api/call/take", content=nested, headers=kind).status_code == 403
    hidden = json.dumps({"data": [file_data("/etc/passwd")]}).encode("utf-16")
    assert client.post("gradio_api/call/take", content=hidden, headers=kind).status_code == 403


# What an upload costs


def _multipart(name: str, head: bytes, count: int) -> tuple[dict[str, str], Iterator[bytes]]:
    """A form with one file of ``head`` and ``count`` zeros, which is never whole in memory."""
    start = (
        f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode() + head
    end = b"\r\n--x--\r\n"
    block = bytes(1 << 20)

    def blocks() -> Iterator[bytes]:
        yield start
        for begin in range(0, count, len(block)):
            yield block[: min(len(block), count - begin)]
        yield end

    headers = {
        "Content-Type": "multipart/form-data; boundary=x",
        "Content-Length": str(len(start) + count + len(end)),
    }
    return headers, blocks()


def test_a_large_upload_does_not_pass_through_memory(
    client: httpx.Client, server: Served, root: Path, tmp_path: Path
) -> None:
    entry = {"dtype": "U8", "shape": [UPLOAD_BYTES], "data_offsets": [0, UPLOAD_BYTES]}
    header = json.dumps({"a": entry}).encode()
    head = len(header).to_bytes(8, "little") + header
    assert take(client, None) == '["nothing"]'
    server.forget_peak()
    before = server.status("VmHWM")
    headers, blocks = _multipart("large.safetensors", head, UPLOAD_BYTES)
    sent = client.post("gradio_api/upload", content=blocks, headers=headers)
    (path,) = sent.json()
    assert Path(path).is_relative_to(root / ".sdopt-ui" / "incoming")
    inode = Path(path).stat().st_ino
    assert take(client, file_data(path)) == '["uploads/large.safetensors"]'
    kept = root / "uploads" / "large.safetensors"
    assert kept.stat().st_size == UPLOAD_BYTES + len(head)
    assert kept.stat().st_ino == inode
    kept.unlink()
    grown = server.status("VmHWM") - before
    assert grown < 150_000


def test_an_upload_has_a_limit(client: httpx.Client, root: Path) -> None:
    incoming = root / ".sdopt-ui" / "incoming"
    before = sorted(incoming.rglob("*"))
    said = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000000\r\n"
    assert _answer(client, said + "Content-Type: multipart/form-data; boundary=x\r\n") == b"413"
    assert sorted(incoming.rglob("*")) == before


def test_an_upload_that_is_no_model_is_refused(client: httpx.Client, root: Path) -> None:
    headers, blocks = _multipart("../../../x.safetensors", b"zeros", 100)
    (path,) = client.post("gradio_api/upload", content=blocks, headers=headers).json()
    assert Path(path).is_relative_to(root / ".sdopt-ui" / "incoming")
    assert "refused" in take(client, file_data(path))
    assert not (root / "uploads" / "x.safetensors").exists()


# What idling does


def test_idle_it_costs_nothing(server: Served) -> None:
    time.sleep(0.5)
    before = server.cpu_seconds()
    time.sleep(5)
    assert server.cpu_seconds() - before < 0.1


def test_a_browser_is_led_nowhere_else(server: Served, root: Path) -> None:
    with browsing() as one:
        one.page.goto(server.address)
        one.page.set_input_files("input[type=file]", root / "model.safetensors")
        one.page.get_by_text("model.safetensors").first.wait_for()
        one.page.get_by_role("button", name="Take").click()
        field = one.page.get_by_label("taken")
        one.page.wait_for_function("e => e.value", arg=field.element_handle())
        assert field.input_value() == "uploads/model.safetensors"
        assert not [url for url in one.requests if not url.startswith((server.address, "blob:"))]
        assert not [text for text in one.complaints if "Content Security Policy" in text]
