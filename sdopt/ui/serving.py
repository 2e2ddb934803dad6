"""The server of the page: one per root, on loopback unless there is a password, asking nobody."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from sdopt.errors import MissingDependencyError, UsageError
from sdopt.ui.app import App, Settings
from sdopt.ui.passwords import Account
from sdopt.ui.workspace import OWN, Workspace
from sdopt.units import size

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

LOCK = "lock"
_GRACE_SECONDS = 2
"""How long a page that is open keeps a server that is told to stop."""
_LOOK_SECONDS = 0.05
_MARGIN_BYTES = 64 << 20
"""What an upload leaves free on the disk."""


def serve(settings: Settings, started: Callable[[str], None] | None = None) -> None:
    """Serve the page until Ctrl-C or SIGTERM; a job that runs goes on without it.

    Args:
        settings: where and how.
        started: is told the address when the page can be asked for.

    Raises:
        UsageError: the root, the host, the port or the password cannot be used, or another server
            works in the root.
        MissingDependencyError: gradio is not installed.
    """
    settings.check()
    _require()
    account = Account.read(settings.auth) if settings.auth else None
    workspace = Workspace(settings.root)
    with ExitStack() as stack:
        listener = stack.enter_context(_listening(settings))
        address = _address(settings.host, listener.getsockname()[1])
        stack.enter_context(_only_one(workspace, address))
        stack.enter_context(_environment(workspace))
        workspace.sweep(0.0)
        queue = importlib.import_module("sdopt.ui.jobs").JobQueue(workspace.root)
        queue.start()
        stack.callback(queue.close)
        application = make(App(workspace, queue, settings), account)
        _server(application, lambda: started(address) if started else None).run([listener])


def make(app: App, account: Account | None = None) -> ASGIApp:
    """The page as an ASGI application, behind its guard."""
    import fastapi
    import gradio as gr
    from fastapi.responses import FileResponse

    from sdopt.ui import guard, names

    page = importlib.import_module("sdopt.ui.page")
    workspace, settings = app.workspace, app.settings
    api = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @api.get("/files/{name}")
    def archive(name: str) -> FileResponse:
        """An archive that ``Workspace.zipped`` made."""
        path = workspace.outgoing / names.made_plain(name)
        if path.name != name or not path.is_file() or path.is_symlink():
            raise fastapi.HTTPException(404)
        return FileResponse(path, filename=name, media_type="application/zip")

    blocks = page.build(app)
    gr.mount_gradio_app(
        api,
        blocks,
        "/",
        server_name=settings.host,
        server_port=settings.port,
        footer_links=[],
        app_kwargs={"openapi_url": None},
        run_history=False,
        auth_dependency=(lambda request: request.scope.get("sdopt.user")) if account else None,
        allowed_paths=[],
        blocked_paths=[str(workspace.root / OWN / LOCK)],
        show_error=True,
        max_file_size=settings.max_upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=page.THEME,
        css=page.CSS,
        i18n=page.I18N,
    )
    # gradio 6.31 checks the paths that a request names only in what was launched, not mounted.
    blocks.has_launched = True
    # It looks for events a thousand times a second, which alone takes 3 % of a core.
    blocks._queue.sleep_when_free = _LOOK_SECONDS
    rules = guard.Rules(
        settings.is_local,
        frozenset(name.lower() for name in (*settings.names, settings.host, *_own_names())),
        account,
        settings.max_upload_bytes,
        (workspace.incoming,),
        lambda count: _room(workspace, count),
    )
    return guard.Guard(api, rules)


def _require() -> None:
    """Refuse to go on without what the page is made with.

    Raises:
        MissingDependencyError: saying what to install.
    """
    missing = [name for name in ("gradio", "httpx") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"the page needs {missing[0]}, which is not installed", hint='pip install "sdopt[ui]"'
        )


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """The port, taken before anything else is done.

    Raises:
        UsageError: another program has it, or the host is none of this machine's.
    """
    host = settings.host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(
            host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, place = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"this machine has no address {host}", why=str(error)) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
            listener.listen(128)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"the port {settings.port} of {host} cannot be used",
                why=getattr(error, "strerror", None) or str(error),
                hint="choose another one: --port 0 takes one that is free",
            ) from None
        yield listener


@contextmanager
def _only_one(workspace: Workspace, address: str) -> Iterator[None]:
    """Hold the root's lock, in which the address stands.

    Raises:
        UsageError: another server holds it; says where that one is.
    """
    path = workspace.root / OWN / LOCK
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                "another sdopt ui works in this folder",
                where=str(workspace.root),
                why=f"it is at {_said(file.read())}",
                hint="use that one, or stop it, or give another --root",
            ) from None
        file.truncate(0)
        json.dump({"address": address, "pid": os.getpid()}, file)
        file.flush()
        yield
        file.truncate(0)


def _said(text: str) -> str:
    """The address in a lock; it is empty for a moment after it was taken."""
    return str(json.loads(text)["address"]) if text else "an address that it has yet to say"


@contextmanager
def _environment(workspace: Workspace) -> Iterator[None]:
    """Gradio is told these by the environment only; as they were, afterwards."""
    wanted = {
        "GRADIO_TEMP_DIR": str(workspace.incoming),
        "GRADIO_EXAMPLES_CACHE": str(workspace.root / OWN / "examples"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _server(application: ASGIApp, ready: Callable[[], None]) -> uvicorn.Server:
    import uvicorn

    from sdopt.ui.ending import Ending

    ending = Ending(application)

    class Server(uvicorn.Server):
        """Says when it can be asked, and ends on a signal without passing it on."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            ending.closing.set()
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

    config = uvicorn.Config(
        ending,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        ws="none",
    )
    return Server(config)


def _address(host: str, port: int) -> str:
    bare = host.removeprefix("[").removesuffix("]")
    return f"http://[{bare}]:{port}/" if ":" in bare else f"http://{bare}:{port}/"


def _own_names() -> tuple[str, ...]:
    return socket.gethostname(), socket.getfqdn()


def _room(workspace: Workspace, count: int) -> str | None:
    """Why so many bytes more have no room; None where they have."""
    workspace.sweep()
    free = shutil.disk_usage(workspace.incoming).free
    if free >= count + _MARGIN_BYTES:
        return None
    return f"The disk has {size(free)} free, and {size(count)} are to come."
