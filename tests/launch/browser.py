"""A headless Chromium that opens a file of this disk: what a person would see of it, what it asked the network for, and what went
wrong in it. Spoken to over a pair of pipes, so there is no port."""

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")


class Browser:
    """`requests`: the addresses that the open page asked for. `mistakes`: texts of its exceptions and console errors."""

    def __init__(self, folder: Path, timeout: float = 60) -> None:
        assert CHROMIUM
        self.timeout, self.requests, self.mistakes = timeout, [], []
        self._id, self._rest = 0, b""
        # Its socket's path must be short: below 108 bytes, which a test's own folder may exceed.
        self._temporary = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        # Chromium reads from 3 and writes to 4. High numbers first, so that neither dup2 overwrites what the other needs.
        its_in, self._out = os.pipe()
        self._in, its_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (its_in, its_out)]

        def connect() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
                   "--remote-debugging-pipe", "about:blank"]  # fmt: skip
        self._process = subprocess.Popen(
            command, env=os.environ | {"TMPDIR": self._temporary.name, "HOME": str(folder)},
            pass_fds=(3, 4), start_new_session=True, preexec_fn=connect,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (its_in, its_out, *high):
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._temporary.cleanup()
        os.close(self._in)
        os.close(self._out)

    def open(self, path: Path) -> None:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.requests, self.mistakes = [], []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable", self._session)
        self._call("Page.navigate", self._session, url=path.as_uri())
        self._answer("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", self._session, expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._answer(self._id)

    def _answer(self, wanted: int | str) -> dict[str, Any]:
        """What answers the message of a number, or the event of a name."""
        end = time.monotonic() + self.timeout
        while True:
            while b"\0" in self._rest:
                line, _, self._rest = self._rest.partition(b"\0")
                message = json.loads(line)
                method, params = message.get("method"), message.get("params", {})
                if method == "Network.requestWillBeSent":
                    self.requests.append(params["request"]["url"])
                elif method == "Runtime.exceptionThrown":
                    self.mistakes.append(str(params["exceptionDetails"]))
                elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                    self.mistakes.append(params["entry"]["text"])
                if wanted in (message.get("id"), method):
                    assert "error" not in message, message
                    return message.get("result", {})
            assert select.select([self._in], [], [], max(0, end - time.monotonic()))[0], f"no answer to {wanted}"
            more = os.read(self._in, 1 << 20)
            assert more, "Chromium ended"
            self._rest += more
