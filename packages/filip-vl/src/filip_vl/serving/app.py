"""The HTTP side of the page, on aiohttp.

The page and its script are files of this package; nothing is fetched from elsewhere. Images are
asked for by their number in the index, so that no path comes from the browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from filip_vl.index import CANDIDATES, TokenIndex
from filip_vl.model import FilipModel
from filip_vl.serving.searcher import Searcher
from tenfold.errors import UserError

log = logging.getLogger(__name__)

HOST, PORT = "127.0.0.1", 8080
MAX_UPLOAD_MIB = 20
HITS = 12

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    index: TokenIndex,
    model: FilipModel,
    *,
    local: bool = True,
    max_upload_mib: float = MAX_UPLOAD_MIB,
) -> web.Application:
    """The page as an aiohttp application.

    Args:
        index: to be searched.
        model: that built it, in eval mode.
        local: answer only requests that name this machine, so that no foreign page can reach the
            images by a name of its own that leads here.
        max_upload_mib: size of the largest picture that can be dropped.

    Raises:
        UserError: another model built the index.
    """
    limit = int(max_upload_mib * 2**20)
    guards = [_only_local] if local else []
    app = web.Application(client_max_size=limit, middlewares=[_settle, *guards])
    handlers = _Handlers(Searcher(index, model), max_upload_mib)
    for path in _FILES:
        app.router.add_get(path, handlers.file)
    app.router.add_get("/about", handlers.about)
    app.router.add_get("/search", handlers.search_text)
    app.router.add_post("/search", handlers.search_picture)
    app.router.add_get(r"/image/{number:\d+}", handlers.image)
    return app


def serve(
    index: TokenIndex,
    model: FilipModel,
    host: str = HOST,
    port: int = PORT,
    *,
    max_upload_mib: float = MAX_UPLOAD_MIB,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Show the page until Ctrl-C.

    Args:
        index: to be searched.
        model: that built it, in eval mode.
        host: address to listen on; any but the loopback address opens the images to others.
        port: 0 for any that is free.
        max_upload_mib: size of the largest picture that can be dropped.
        tell: is given the line with the address, once the page can be opened; printed if left out.

    Raises:
        UserError: the address is taken or is none of this machine, or another model built the
            index.
    """
    local = is_loopback(host)
    if not local:
        log.warning("%s is not the loopback address: others can see the indexed images", host)
    app = make_app(index, model, local=local, max_upload_mib=max_upload_mib)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(app, host, port, tell or _print_now))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _print_now(line: str) -> None:
    print(line, flush=True)  # the next one may be hours away


async def _run(app: web.Application, host: str, port: int, tell: Callable[[str], None]) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            fix = "choose another host or port"
            raise UserError(f"cannot listen: {why}", where=f"{host}:{port}", fix=fix) from error
        name = f"[{host}]" if ":" in host else host
        tell(f"http://{name}:{runner.addresses[0][1]}/ shows the index; Ctrl-C ends it")
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError):  # Windows; a thread
            loop.add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
    finally:
        await runner.cleanup()


class _Handlers:
    """One method for each kind of request."""

    def __init__(self, searcher: Searcher, max_upload_mib: float) -> None:
        self.searcher, self.max_upload_mib = searcher, max_upload_mib
        self.turn = asyncio.Lock()  # one search at a time has all cores

    async def file(self, request: web.Request) -> web.Response:
        """A file of the page."""
        name, kind = _FILES[request.path]
        text = (resources.files("filip_vl.serving") / name).read_text("utf-8")
        return web.Response(text=text, content_type=kind)

    async def about(self, request: web.Request) -> web.Response:
        """What there is to be searched."""
        return web.json_response(self.searcher.about())

    async def search_text(self, request: web.Request) -> web.Response:
        """Hits for the words of `?text=`."""
        return await self._found(request, self.searcher.text, request.query.get("text", ""))

    async def search_picture(self, request: web.Request) -> web.Response:
        """Hits for the picture that is the body."""
        try:
            content = await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            what = f"the picture is larger than {self.max_upload_mib:g} MiB"
            raise _Refused(what, 413) from error
        return await self._found(request, self.searcher.picture, content)

    async def image(self, request: web.Request) -> web.Response:
        """An image of the index, small, by its number."""
        number, side = int(request.match_info["number"]), _number(request, "side", 256)
        try:
            content = await asyncio.to_thread(self.searcher.thumbnail, number, side)
        except UserError as error:
            raise _Refused(str(error), 404) from error
        return web.Response(body=content, content_type="image/jpeg")

    async def _found(
        self, request: web.Request, search: Callable[..., dict[str, Any]], query: str | bytes
    ) -> web.Response:
        k, candidates = _number(request, "k", HITS), _number(request, "candidates", CANDIDATES)
        async with self.turn:
            answer = await asyncio.to_thread(search, query, k, candidates)
        return web.json_response(answer)


class _Refused(Exception):
    """A request that gets one line and a status."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.status = status


def _number(request: web.Request, name: str, usual: int) -> int:
    text = request.query.get(name, str(usual))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _Refused(f"{name} must be a whole number, got {text[:20]!r}", 400)
    return int(text)


@web.middleware
async def _settle(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tells whatever goes wrong in one line of JSON, and says what the page may load."""
    try:
        response = await handler(request)
    except UserError as error:
        response = _line(str(error), 400)
    except _Refused as error:
        response = _line(str(error), error.status)
    except web.HTTPException as error:
        response = _line(error.reason, error.status)
    except Exception:
        log.exception("%s %s", request.method, request.path)
        response = _line("an error of the program, see where it was started", 500)
    response.headers.update(_HEADERS)
    return response


@web.middleware
async def _only_local(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses names that are not this machine's (DNS rebinding)."""
    try:
        name = urlsplit(f"//{request.host}").hostname
    except ValueError:
        name = None
    if name not in _LOOPBACK_NAMES:
        raise _Refused("this page is for the machine that it runs on", 403)
    return await handler(request)


def _line(error: str, status: int) -> web.Response:
    return web.json_response({"error": error}, status=status)
