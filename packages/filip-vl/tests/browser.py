"""A headless Chromium, driven through its DevTools protocol: no driver has to be installed."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A page of the browser; `complaints` are what its console said."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket, self.last, self.complaints = socket, 0, []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.last += 1
        await self.socket.send_str(
            json.dumps({"id": self.last, "method": method, "params": params})
        )
        while True:
            message = json.loads(await self.socket.receive_str(timeout=30))
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(message["params"])
            if message.get("id") == self.last:
                assert "error" not in message, message
                return message["result"]

    async def run(self, script: str) -> Any:
        """Value of an expression in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> Any:
        """Waits for an expression to be true."""
        for _ in range(400):
            if value := await self.run(script):
                return value
            await asyncio.sleep(0.025)
        raise AssertionError(
            f"never came true: {script}; {await self.run('document.body.innerText')}"
        )

    async def type(self, selector: str, text: str) -> None:
        """Types into a field and presses Enter."""
        await self.run(f"document.querySelector('{selector}').select()")
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            await self.call("Input.dispatchKeyEvent", type=kind, **key)

    async def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    async def point(self, x: float, y: float) -> None:
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def drop(self, file: Path, x: float, y: float) -> None:
        """Drops a file of the disk on the page."""
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    async def middle(self, script: str) -> tuple[float, float]:
        """The middle of an element, in the window."""
        box = await self.run(f"(({script}).getBoundingClientRect().toJSON())")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@contextlib.asynccontextmanager
async def opened(browser: str, address: str, profile: Path) -> AsyncIterator[Page]:
    """The page at an address, in a browser that ends with the block."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--no-first-run", "--window-size=1100,800", f"--user-data-dir={profile}"]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        browser, *options, "--remote-debugging-port=0", "about:blank", stdout=quiet, stderr=quiet
    )
    try:
        port = await _port(profile / "DevToolsActivePort")
        async with ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                targets = await response.json(content_type=None)
            where = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
            async with session.ws_connect(where, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=address)
                yield page
    finally:
        process.terminate()
        await process.wait()


async def _port(file: Path) -> int:
    for _ in range(1200):
        if file.is_file() and (lines := file.read_text().split()):
            return int(lines[0])
        await asyncio.sleep(0.025)
    raise AssertionError("the browser did not start")
