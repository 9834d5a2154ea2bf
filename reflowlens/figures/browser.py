"""A headless Chrome or Chromium, spoken to through its debugging pipe: what draws PNG, SVG and PDF.

One process serves any number of drawings, needs no network port, no driver and no package, and ends with its block.
The messages are those of the Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reflowlens.errors import ReflowlensError

NAMES = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome", "microsoft-edge")
APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",  # a container's /dev/shm is often too small
    "--disable-extensions",
    "--disable-sync",
    "--enable-unsafe-swiftshader",  # figures in three dimensions where there is no GPU
    "--hide-scrollbars",
    "--mute-audio",
)
_SECONDS = 60.0  # to wait for an answer


def find_browser() -> str:
    """The path of the browser: ``BROWSER_PATH`` if that is set, else the first Chrome or Chromium that is installed.

    Raises:
        ReflowlensError: there is none; the message says how to install one.
    """
    named = os.environ.get("BROWSER_PATH")
    if named:
        if not os.access(named, os.X_OK):
            raise ReflowlensError(f"BROWSER_PATH is {named!r}, which is no program: the path of a Chrome was expected")
        return named
    for name in (*NAMES, *APPLICATIONS):
        if path := shutil.which(name):
            return path
    raise ReflowlensError(
        "PNG, SVG and PDF are drawn by Chrome or Chromium, and none was found: apt-get install chromium "
        "(macOS: brew install --cask google-chrome), or set BROWSER_PATH; .html and .json need none"
    )


class Page:
    """The one page of a browser: scripts run in it, and it is printed.

    ``complaints``: the errors of its console so far: of scripts, uncaught exceptions, files that did not load.
    """

    def __init__(self, receive: int, send: int) -> None:
        self._receive, self._send = receive, send
        self._unread, self._calls, self._session = b"", 0, ""
        self.complaints: list[str] = []

    def open(self, url: str) -> None:
        """Load a page and wait until its scripts have run."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of an expression, or of what it promises, as JSON can hold it.

        Raises:
            ReflowlensError: the script failed.
        """
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if failure := answer.get("exceptionDetails"):
            why = failure.get("exception", {}).get("description") or failure["text"]
            raise ReflowlensError(f"the browser could not draw this figure: {' '.join(why.split())[:300]}")
        return answer["result"].get("value")

    def pdf(self, width: float, height: float) -> bytes:
        """The page as a PDF of one sheet of that size in inches, without margins."""
        margins = dict.fromkeys(("marginTop", "marginBottom", "marginLeft", "marginRight"), 0)
        paper = {"paperWidth": width, "paperHeight": height, "pageRanges": "1", "printBackground": True}
        return base64.b64decode(self.call("Page.printToPDF", **paper, **margins, generateTaggedPDF=False)["data"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one message and wait for its answer.

        Raises:
            ReflowlensError: the browser refuses, ends or does not answer.
        """
        self._calls += 1
        number = self._calls
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        unsent = memoryview(json.dumps(message).encode() + b"\0")
        try:
            while unsent:
                unsent = unsent[os.write(self._send, unsent) :]
        except BrokenPipeError as error:
            raise ReflowlensError("the browser ended before it had drawn everything") from error
        answer = self._until(lambda message: message.get("id") == number)
        if "error" in answer:
            raise ReflowlensError(f"the browser refused {method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def _until(self, wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while True:
            text, end, rest = self._unread.partition(b"\0")
            if end:
                self._unread = rest
                message: dict[str, Any] = json.loads(text)
                self.complaints += _complaints(message)
                if wanted(message):
                    return message
                continue
            if not select.select([self._receive], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ReflowlensError(f"the browser did not answer within {_SECONDS:.0f} s")
            part = os.read(self._receive, 1 << 20)
            if not part:
                raise ReflowlensError("the browser ended before it had drawn everything; does it start by itself?")
            self._unread += part


def _complaints(message: dict[str, Any]) -> list[str]:
    """What the console shows as errors, from one message of the browser."""
    params = message.get("params", {})
    match message.get("method"):
        case "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            return [details.get("exception", {}).get("description") or details["text"]]
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
            return [" ".join(str(part.get("value", part.get("description", ""))) for part in params["args"])]
        case "Log.entryAdded" if params["entry"]["level"] == "error":
            return [f"{params['entry']['text']} {params['entry'].get('url', '')}".strip()]
    return []


@contextmanager
def browser_page() -> Iterator[Page]:
    """Start the browser once, in a profile of its own, and end it and remove the profile with the block.

    Raises:
        ReflowlensError: there is no browser (:func:`find_browser`), or it does not start.

    Example: ``with browser_page() as page: page.open("about:blank"); page.evaluate("1 + 1")``
    """
    program = find_browser()
    with tempfile.TemporaryDirectory(prefix="reflowlens-browser-", ignore_cleanup_errors=True) as profile:
        flags = [*_FLAGS, f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chrome refuses to start as root with it; it loads nothing but our own page
        # The browser reads its descriptor 3 and writes 4; ours lie above, so that neither covers the other.
        its_in, our_out = map(_above, os.pipe())
        our_in, its_out = map(_above, os.pipe())
        silent = [(os.POSIX_SPAWN_OPEN, i, os.devnull, os.O_RDWR, 0) for i in (0, 1, 2)]
        channels = [(os.POSIX_SPAWN_DUP2, its_in, 3), (os.POSIX_SPAWN_DUP2, its_out, 4)]
        process = os.posix_spawn(program, [program, *flags], os.environ, file_actions=[*silent, *channels], setpgroup=0)
        os.close(its_in)
        os.close(its_out)
        page = Page(our_in, our_out)
        try:
            yield page
        finally:
            with contextlib.suppress(ReflowlensError):
                page._session = ""
                page.call("Browser.close")
            os.close(our_in)
            os.close(our_out)
            _end(process)


def _above(descriptor: int) -> int:
    """The same file under a number of 10 or more, closed in other programs."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return high


def _end(process: int, seconds: float = 5.0) -> None:
    """Wait for a process that was asked to end; then end its group."""
    deadline = time.monotonic() + seconds
    while os.waitpid(process, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return
        time.sleep(0.02)
