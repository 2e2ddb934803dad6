"""Downloads go on where they broke off, end at a limit, and never reach an address inside."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sdopt.errors import (
    FetchError,
    SdoptError,
    SourceError,
    StorageError,
    UsageError,
    WeightsError,
)
from sdopt.ui import addresses, fetching, storing
from sdopt.ui.addresses import CheckedTransport, RefusedAddressError
from tests.exporters.test_checkpoint import floats, table, write
from tests.ui.file_server import Hosted, hosting

GB = 10**9


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "m.safetensors"
    write(path, table(a=[100_000]), floats(100_000))
    return path.read_bytes()


@pytest.fixture
def hosted(content: bytes) -> Iterator[Hosted]:
    with hosting(Hosted(content)) as one:
        yield one


def fetch(hosted: Hosted, folder: Path, url: str = "", **options: Any) -> Path:
    given: dict[str, Any] = {"limit_bytes": GB, "allow_private": True, "pause": lambda _: None}
    return fetching.fetch(url or hosted.url, folder, **(given | options))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_comes_whole_and_alone(hosted: Hosted, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    made = fetch(hosted, tmp_path / "new", progress=lambda *one: told.append(one))
    assert made == tmp_path / "new" / "model.safetensors"
    assert made.read_bytes() == hosted.content
    assert os.listdir(made.parent) == ["model.safetensors"]
    assert {what for what, _ in told} == {"download model.safetensors"}
    assert all(0 <= share <= 1 for _, share in told)


def test_broken_off_it_goes_on_in_the_same_call(hosted: Hosted, tmp_path: Path) -> None:
    hosted.break_after = [100_000, 150_000]
    made = fetch(hosted, tmp_path, sha256=digest(hosted.content).upper())
    assert made.read_bytes() == hosted.content
    ranges = [one.get("Range") for one in hosted.requests]
    assert ranges == [None, "bytes=100000-", "bytes=250000-"]
    assert hosted.requests[1]["If-Range"] == '"one"'


def test_and_in_a_later_call(hosted: Hosted, tmp_path: Path) -> None:
    hosted.break_after = [100_000] + [0] * 9
    with pytest.raises(FetchError, match="broke off") as caught:
        fetch(hosted, tmp_path)
    assert "100.0 kB are kept" in (caught.value.hint or "")
    assert sorted(os.listdir(tmp_path)) == [
        "model.safetensors.part",
        "model.safetensors.part.json",
    ]
    hosted.break_after, hosted.requests = [], []
    made = fetch(hosted, tmp_path, sha256=digest(hosted.content))
    assert made.read_bytes() == hosted.content
    assert [one.get("Range") for one in hosted.requests] == ["bytes=100000-"]
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_part_that_is_whole_is_not_fetched_again(hosted: Hosted, tmp_path: Path) -> None:
    hosted.break_after = [100_000] + [0] * 9
    with pytest.raises(FetchError):
        fetch(hosted, tmp_path)
    (tmp_path / "model.safetensors.part").write_bytes(hosted.content)
    hosted.break_after = []
    made = fetch(hosted, tmp_path, sha256=digest(hosted.content))
    assert made.read_bytes() == hosted.content
    (tmp_path / "model.safetensors").unlink()


def test_a_file_that_changed_is_begun_again(
    hosted: Hosted, content: bytes, tmp_path: Path
) -> None:
    changed = content[:-4] + b"\0\0\0\1"

    def change(one: Hosted) -> None:
        if len(one.requests) == 2:
            one.etag, one.content = '"two"', changed

    hosted.before, hosted.break_after = change, [100_000]
    made = fetch(hosted, tmp_path)
    assert made.read_bytes() == changed


def test_one_that_changed_behind_its_length_is_noticed(
    hosted: Hosted, content: bytes, tmp_path: Path
) -> None:
    """A server that ignores If-Range, and then says in its answer what it now has."""
    changed = content[:-4] + b"\0\0\0\1"

    class Careless(str):
        __slots__ = ()

        def __eq__(self, _: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    def change(one: Hosted) -> None:
        if len(one.requests) == 2:
            one.etag, one.content = Careless('"two"'), changed

    hosted.before, hosted.break_after = change, [100_000]
    assert fetch(hosted, tmp_path).read_bytes() == changed
    assert [one.get("Range") for one in hosted.requests] == [None, "bytes=100000-", None]


@pytest.mark.parametrize("how", ["no ranges", "no validator", "weak"])
def test_where_it_cannot_go_on_it_begins_again(hosted: Hosted, tmp_path: Path, how: str) -> None:
    hosted.ranges = how != "no ranges"
    hosted.etag = {"no ranges": '"one"', "no validator": "", "weak": 'W/"one"'}[how]
    hosted.break_after = [100_000]
    assert fetch(hosted, tmp_path, sha256=digest(hosted.content)).read_bytes() == hosted.content
    assert len(hosted.requests) == 2


def test_a_date_is_a_validator_too(hosted: Hosted, tmp_path: Path) -> None:
    hosted.etag, hosted.modified = "", "Wed, 21 Oct 2015 07:28:00 GMT"
    hosted.break_after = [100_000]
    fetch(hosted, tmp_path)
    assert hosted.requests[1]["If-Range"] == hosted.modified


def test_a_length_above_the_limit_is_refused_before(hosted: Hosted, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="too large"):
        fetch(hosted, tmp_path, limit_bytes=len(hosted.content) - 1)
    assert os.listdir(tmp_path) == []


def test_bytes_without_a_length_are_counted(hosted: Hosted, tmp_path: Path) -> None:
    hosted.says_length = False
    with pytest.raises(FetchError, match="too large"):
        fetch(hosted, tmp_path, limit_bytes=len(hosted.content) - 1)
    assert os.listdir(tmp_path) == []
    assert fetch(hosted, tmp_path, limit_bytes=len(hosted.content)).is_file()


def test_what_has_no_room_is_refused_before(
    hosted: Hosted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": len(hosted.content) - 1})
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="too little space"):
        fetch(hosted, tmp_path)
    assert os.listdir(tmp_path) == []


def test_another_digest_is_another_file(hosted: Hosted, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="not the file") as caught:
        fetch(hosted, tmp_path, sha256="0" * 64)
    assert digest(hosted.content) in (caught.value.why or "")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UsageError, match="no SHA-256"):
        fetch(hosted, tmp_path, sha256="abc")


def test_a_server_that_falls_silent_is_given_up(hosted: Hosted, tmp_path: Path) -> None:
    hosted.pause_seconds = 0.4
    with pytest.raises(FetchError, match="broke off") as caught:
        fetch(hosted, tmp_path, timeout=0.05)
    assert "in time" in (caught.value.why or "")


def test_waits_grow_and_a_busy_server_is_asked_again(hosted: Hosted, tmp_path: Path) -> None:
    waits: list[float] = []
    hosted.status = [503, 429, 500]
    assert fetch(hosted, tmp_path, pause=waits.append).is_file()
    assert waits == [1.0, 2.0, 4.0]
    hosted.status = [503] * 9
    with pytest.raises(FetchError, match="broke off") as caught:
        fetch(hosted, tmp_path)
    assert "503" in (caught.value.why or "")
    assert len(hosted.status) == 9 - fetching.TRIES


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_is_not_asked_again(hosted: Hosted, tmp_path: Path, code: int) -> None:
    hosted.status = [code] * 9
    with pytest.raises(FetchError, match="does not give"):
        fetch(hosted, tmp_path)
    assert len(hosted.requests) == 1


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('attachment; filename="v1-5.safetensors"', "v1-5.safetensors"),
        ("attachment; filename*=UTF-8''na%C3%AFve%20model.safetensors", "naive_model.safetensors"),
        ('attachment; filename="../../etc/cron.d/x.safetensors"', "x.safetensors"),
        ('attachment; filename="..\\\\..\\\\x.safetensors"', "x.safetensors"),
        ('attachment; filename="/etc/.hidden.safetensors"', "hidden.safetensors"),
        ("attachment", "model.safetensors"),
    ],
)
def test_the_name_is_the_servers_made_plain(
    hosted: Hosted, tmp_path: Path, disposition: str, name: str
) -> None:
    hosted.disposition = disposition
    assert fetch(hosted, tmp_path) == tmp_path / name


def test_another_file_of_the_name_is_left_alone(hosted: Hosted, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    assert fetch(hosted, tmp_path).name == "model-2.safetensors"
    assert fetch(hosted, tmp_path).name == "model-2.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert len(os.listdir(tmp_path)) == 2


def test_what_is_no_model_does_not_stay(hosted: Hosted, tmp_path: Path) -> None:
    hosted.disposition = 'attachment; filename="model.ckpt"'
    with pytest.raises(SourceError, match="are taken"):
        fetch(hosted, tmp_path)
    hosted.disposition, hosted.content_type = "", "text/html; charset=utf-8"
    with pytest.raises(FetchError, match="web page"):
        fetch(hosted, tmp_path)
    hosted.content_type, hosted.content = "", hosted.content[:-4]
    with pytest.raises(WeightsError):
        fetch(hosted, tmp_path)
    assert os.listdir(tmp_path) == []


def test_two_at_once_do_not_write_one_part(hosted: Hosted, tmp_path: Path) -> None:
    from sdopt.ui.partial import Part

    with (
        Part(tmp_path, "model.safetensors").opened(),
        pytest.raises(FetchError, match="already"),
    ):
        fetch(hosted, tmp_path)


def test_a_part_that_is_a_link_is_not_written_through(hosted: Hosted, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.part").symlink_to(tmp_path / "target")
    with pytest.raises(SdoptError):
        fetch(hosted, tmp_path / "in")
    assert (tmp_path / "target").read_text() == "mine"


def test_no_secret_of_a_url_is_told_or_kept(hosted: Hosted, tmp_path: Path) -> None:
    secret = "hunter2"
    url = hosted.url.replace("//", f"//user:{secret}@") + f"?token={secret}#{secret}"
    hosted.break_after = [100_000] + [0] * 9
    with pytest.raises(FetchError) as caught:
        fetch(hosted, tmp_path, url)
    kept = (tmp_path / "model.safetensors.part.json").read_text()
    hosted.status = [404]
    with pytest.raises(FetchError) as other:
        fetch(hosted, tmp_path, url)
    hosted.status, hosted.location = [302] * 9, f"http://10.0.0.1/?token={secret}"
    with pytest.raises(FetchError) as third:
        fetch(hosted, tmp_path, url, allow_private=False)
    assert secret not in str(caught.value) + str(other.value) + str(third.value) + kept
    assert hosted.url in str(caught.value)
    assert hosted.requests[0]["Authorization"].startswith("Basic ")
    assert json.loads(kept)["url"].startswith(hosted.url + "?")
    for bad in (f"ftp://user:{secret}@host/x", secret, f"https://?{secret}"):
        with pytest.raises(UsageError) as refused:
            fetching.fetch(bad, tmp_path, limit_bytes=GB)
        assert secret not in str(refused.value)


def _public(monkeypatch: pytest.MonkeyPatch, hosted: Hosted) -> None:
    """Let ``public.example`` be a public address, and that address the server of the test."""
    real = addresses.resolve

    def resolve(host: str, port: int) -> list[addresses.Address]:
        if host == "public.example":
            return [ipaddress.ip_address("93.184.215.14")]
        return real(host, port)

    class ToTest(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            assert request.url.host == "93.184.215.14"
            request.url = request.url.copy_with(host="127.0.0.1", port=hosted.port)
            return super().handle_request(request)

    def transport(allow_private: bool) -> CheckedTransport:
        return CheckedTransport(allow_private, ToTest(trust_env=False))

    monkeypatch.setattr(addresses, "resolve", resolve)
    monkeypatch.setattr(fetching, "CheckedTransport", transport)


def test_a_public_name_is_asked_by_the_address_that_was_checked(
    hosted: Hosted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _public(monkeypatch, hosted)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    made = fetch(hosted, tmp_path, "http://public.example/m.safetensors", allow_private=False)
    assert made.read_bytes() == hosted.content
    assert hosted.requests[0]["Host"] == "public.example"


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:80/x.safetensors",
        "//localhost/x.safetensors",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:10.0.0.1]/x",
        "http://0x7f.1/x",
        "file:///etc/passwd",
        "ftp://public.example/x",
    ],
)
def test_every_redirect_is_checked(
    hosted: Hosted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    _public(monkeypatch, hosted)
    hosted.status, hosted.location = [302] * 9, location
    url = "http://public.example/m.safetensors"
    with pytest.raises(FetchError):
        fetch(hosted, tmp_path, url, allow_private=False)
    assert len(hosted.requests) == 1
    assert os.listdir(tmp_path) == []


def test_redirects_end(hosted: Hosted, tmp_path: Path) -> None:
    hosted.status, hosted.location = [302] * fetching.REDIRECTS, "/other/model.safetensors"
    assert fetch(hosted, tmp_path).is_file()
    hosted.status = [302] * 99
    with pytest.raises(FetchError, match="redirects too often"):
        fetch(hosted, tmp_path)
    assert 99 - len(hosted.status) == fetching.REDIRECTS + 1


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.255.255.254",
        "localhost",
        "LOCALHOST",
        "0.0.0.0",
        "0",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "017700000001",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[fc00::1]",
        "[ff02::1]",
        "[2001:db8::1]",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "192.0.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
    ],
)
def test_addresses_inside_are_refused(tmp_path: Path, host: str) -> None:
    for url in (f"http://{host}/m.safetensors", f"https://{host}:8443/m.safetensors"):
        with pytest.raises(RefusedAddressError) as caught:
            fetching.fetch(url, tmp_path, limit_bytes=GB)
        assert "--allow-private-urls" in (caught.value.hint or "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(text: str) -> None:
    assert addresses.is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "found", [["10.0.0.1"], ["93.184.215.14", "127.0.0.1"], ["::1"], ["fe80::1%eth0"]]
)
def test_a_name_that_leads_inside_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[str]
) -> None:
    asked: list[str] = []

    def resolver(host: str, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, 80)) for text in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    with pytest.raises(RefusedAddressError):
        fetching.fetch("http://rebind.example/m.safetensors", tmp_path, limit_bytes=GB)
    assert asked == ["rebind.example"]


def test_the_name_is_resolved_once_and_tls_is_for_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resolver that says something public at first, and something inside from then on."""
    answers = [["93.184.215.14"], ["127.0.0.1"]]
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [(socket.AF_INET, 1, 6, "", (text, 443)) for text in answers.pop(0)],
    )
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200)

    transport = CheckedTransport(False, httpx.MockTransport(answer))
    with httpx.Client(transport=transport) as client:
        client.get("https://rebind.example/x")
    assert sent[0].url.host == "93.184.215.14"
    assert sent[0].headers["Host"] == "rebind.example"
    assert sent[0].extensions["sni_hostname"] == "rebind.example"
    assert len(answers) == 1


def test_the_next_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    both = [ipaddress.ip_address(text) for text in ("2606:4700::1111", "93.184.215.14")]
    monkeypatch.setattr(addresses, "resolve", lambda *_: both)

    def answer(request: httpx.Request) -> httpx.Response:
        tried.append(request.url.host)
        if ":" in request.url.host:
            raise httpx.ConnectError("unreachable")
        return httpx.Response(200)

    with httpx.Client(transport=CheckedTransport(False, httpx.MockTransport(answer))) as client:
        assert client.get("http://two.example/").status_code == 200
    assert tried == ["2606:4700::1111", "93.184.215.14"]
