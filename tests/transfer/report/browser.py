"""Headless Chromium over its DevTools protocol: opens a page and tells what went on in it.

The protocol runs over a pair of pipes (``--remote-debugging-pipe``), JSON messages that end with a
zero byte, so no port is opened and no library is needed.
"""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
ANSWER_SECONDS = 60.0


def find_browser() -> str:
    """Path of Chromium; RuntimeError says what to install."""
    found = subprocess.run(
        [ROOT / "tools/find_chromium.sh"], capture_output=True, text=True, check=False, timeout=60
    )
    if found.returncode != 0:
        raise RuntimeError(found.stderr.strip())
    return found.stdout.strip()


class Page:
    """One tab.

    Attributes:
        events: everything that the browser reported, (method, parameters), in order.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        answer = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(method)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def open(self, address: str) -> None:
        """Load a page and wait until everything on it is there."""
        self.call("Page.navigate", url=address)
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        sent = [event for method, event in self.events if method == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console."""
        found = []
        for method, event in self.events:
            if method == "Runtime.exceptionThrown":
                found.append(str(event["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning"):
                found.append(str(event["args"]))
            elif method == "Log.entryAdded":
                found.append(str(event["entry"]["text"]))
        return found

    def _receive(self, waiting_for: str) -> dict[str, Any]:
        """The next message; an event is remembered."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while b"\0" not in self._unread:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._from], [], [], max(0.0, left))
            if not ready:
                raise TimeoutError(f"{waiting_for}: no answer in {ANSWER_SECONDS} s")
            read = os.read(self._from, 1 << 20)
            if not read:
                raise RuntimeError(f"the browser ended while waiting for {waiting_for}")
            self._unread += read
        text, self._unread = self._unread.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are neither descriptor 3 nor 4, which the browser's own take."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


@contextlib.contextmanager
def opened_browser(profile: Path) -> Iterator[Page]:
    """A browser with one tab, ended with the block.

    Args:
        profile: an empty folder for its files.
    """
    browser = find_browser()
    browser_reads, we_write = _high_pipe()
    we_read, browser_writes = _high_pipe()
    # Chromium reads commands from descriptor 3 and answers on 4; the shell puts the pipes there.
    script = f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}'
    options = [
        "--headless",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
        # Containers give it neither a sandbox for root nor much shared memory.
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--window-size=1100,1400",
    ]
    with (profile / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", browser, *options],
            pass_fds=(browser_reads, browser_writes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    os.close(browser_reads)
    os.close(browser_writes)
    try:
        yield Page(we_write, we_read)
    finally:
        # It ends by itself when its pipe is closed; a stuck one does not hold the tests.
        os.close(we_write)
        os.close(we_read)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
