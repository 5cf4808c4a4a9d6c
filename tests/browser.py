"""A Chromium without a window, driven over a pipe by its DevTools protocol: no driver and no package is needed."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    """The browser's program, None where none is installed. CHROMIUM in the environment names another."""
    return os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """A page in the browser; `events` holds all that the browser told of it by itself."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from, self._buffer, self._number = to_browser, from_browser, b"", 0
        self.events: list[dict[str, Any]] = []
        self._tab: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._tab:
            message["sessionId"] = self._tab
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        while not any(one.get("method") == event for one in self.events):
            self.events.append(self._next())

    def _next(self, seconds: float = 120) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], seconds)
            data = os.read(self._from, 1 << 20) if ready else b""
            assert data, "the browser has ended, or says nothing"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int, height: int = 800, dark: bool = False) -> float:
        """Load a file at this width, as on a phone where it is below 600. Seconds until it was loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        begin = time.perf_counter()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")
        return time.perf_counter() - begin

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings on the console, exceptions, and whatever the page asked the network for."""
        self.value("0")  # what was said before has come by now
        found = []
        for event in self.events:
            method, about = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown" or (
                method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert")
            ):
                found.append(json.dumps(about))
            if method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
                found.append(about["entry"]["text"])
            if method == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("file:", "data:")):
                found.append(f"asks for {about['request']['url']}")
        return found

    def picture(self, file: Path, top: int = 0, height: int = 800, scale: float = 1) -> None:
        """A part of the page as PNG, from `top` on, as wide as the page was opened."""
        width = self.value("window.innerWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": scale}
        data = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser(program: str, folder: Path) -> Iterator[Tab]:
    """A browser that ends with the block; folder: where it keeps its own files."""
    ours, theirs = os.pipe(), os.pipe()  # what it reads, and what it writes
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={folder}"]

    def place() -> None:  # where the protocol expects them
        os.dup2(ours[0], 103)
        os.dup2(theirs[1], 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    with (folder / "stderr.txt").open("w") as log:
        process = subprocess.Popen(
            [program, *flags], preexec_fn=place, pass_fds=(3, 4), stdout=log, stderr=log, start_new_session=True
        )
    os.close(ours[0])
    os.close(theirs[1])
    try:
        yield Tab(ours[1], theirs[0])
    finally:
        os.close(ours[1])  # it ends when nobody can talk to it any more
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(theirs[0])
