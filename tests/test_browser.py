"""``examples/stream_to_browser.py``, asked by an HTTP client, and looked at with a real browser where there is one."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from .eventsource import Event, EventSource
from .harness import until
from .servers import TcpProxy

_EXAMPLE = Path(__file__).parent.parent / "examples" / "stream_to_browser.py"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)

#: Seconds per word: a task that is to be stopped gets no further than the first.
NEVER = 3600.0

TEXT = " ".join(f"{n} green bottles hanging on the wall;" for n in range(20, 0, -1)) + " none.\n“Ça suffit!” 🍾"


@asynccontextmanager
async def example(seconds_per_word: float) -> AsyncIterator[str]:
    """The URL at which the example serves."""
    environ = {**os.environ, "SECONDS_PER_WORD": str(seconds_per_word), "PYTHONPATH": str(_EXAMPLE.parent.parent)}
    command = [sys.executable, "-W", "error", str(_EXAMPLE)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    try:
        if url:
            yield url
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert url, errors.decode()
    assert (process.returncode, errors.decode()) == (0, "")


async def received(client: httpx.AsyncClient, source: EventSource, url: str) -> AsyncGenerator[list[Event], None]:
    """One connection of an event source: the events of each piece of the body."""
    headers = {"Last-Event-ID": source.last_id} if source.last_id else {}
    async with client.stream("GET", url, headers=headers) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        async for data in response.aiter_bytes():
            yield source.feed(data)


async def test_a_client_that_comes_back_after_every_tenth_chunk_has_the_text_whole() -> None:
    async with example(0.002) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        task = (await client.post("tasks")).headers["location"]
        source, seen = EventSource(), list[Event]()
        connections = 0
        while not seen or seen[-1].name != "end":
            connections += 1
            had = len(seen)
            async with aclosing(received(client, source, f"{task}/output")) as connection:
                async for new in connection:
                    seen += new
                    if len(seen) >= had + 10:
                        break
            source.cut()
        assert "".join(event.value for event in seen[:-1]) == TEXT
        assert seen[-1].value == {"state": "SUCCESS"}
        assert connections > 1
        assert (await client.get(f"{task}/output", headers={"Last-Event-ID": "<script>"})).status_code == 400


async def test_progress_is_told_and_the_button_stops_the_task() -> None:
    async with example(NEVER) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        task = (await client.post("tasks")).headers["location"]
        told: list[Event] = []
        async for new in received(client, EventSource(), f"{task}/states"):
            told += new
            for event in new:
                if event.name == "state" and event.value["state"] == "PROGRESS":
                    assert event.value["result"]["current"] == 1
                    assert (await client.post(f"{task}/revoke")).status_code == 202
        assert [event.name for event in told[-2:]] == ["error", "end"]
        assert told[-1].value == {"state": "REVOKED"}
        again = [event.value async for new in received(client, EventSource(), f"{task}/output") for event in new]
        assert again == ["20", {"type": "TaskRevokedError", "message": "stopped in the browser"}, {"state": "REVOKED"}]


# -- a real browser --------------------------------------------------------------------------------------------------

#: Puts two pipes where Chromium looks for them, and becomes Chromium.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A tab of a headless Chromium, over its DevTools protocol on two pipes: JSON, each message ended by NUL."""

    def __init__(self, reader: asyncio.StreamReader, write: Callable[[bytes], object]) -> None:
        self._reader = reader
        self._write = write
        self._count = 0
        self._session = ""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": params, **session}
        self._write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            if answer.get("id") == self._count:
                result: dict[str, Any] = answer.get("result", {})
                return result

    async def open(self, url: str) -> None:
        """Show ``url`` in a new tab."""
        self._session = ""
        target = await self.call("Target.createTarget", url=url)
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    async def reload(self) -> None:
        """Return once the page that there was is gone."""
        await self.evaluate("window.before = true; location.reload()")
        await self.shows("window.before === undefined")

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; ``None`` while there is no page."""
        return (await self.call("Runtime.evaluate", expression=expression)).get("result", {}).get("value")

    async def shows(self, expression: str) -> None:
        """Return once the expression is true in the page."""

        async def true() -> bool:
            return await self.evaluate(expression) is True

        await until(true)


def _pipe() -> list[int]:
    """A pipe whose ends are none of those that are to be replaced by them."""
    low = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in low]
    for fd in low:
        os.close(fd)
    return high


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Browser]:
    if _BROWSER is None:
        pytest.skip(f"no browser is installed here (looked for {', '.join(_NAMES)}): the page was not looked at")
    theirs_in, ours_out, ours_in, theirs_out = (*_pipe(), *_pipe())
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "--disable-background-networking"]
    command = [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), _BROWSER, *flags]
    process = await asyncio.create_subprocess_exec(
        *command, pass_fds=(theirs_in, theirs_out), stderr=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    os.close(theirs_in)
    os.close(theirs_out)
    reader = asyncio.StreamReader(limit=2**24)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_in, "rb"))
    try:
        browser = Browser(reader, lambda data: os.write(ours_out, data))
        yield browser
        browser._session = ""
        await browser.call("Browser.close")
    finally:
        transport.close()
        os.close(ours_out)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_the_page_in_a_real_browser(tmp_path: Path) -> None:
    requests: list[bytes] = []
    async with chromium(tmp_path) as browser:
        async with example(0.005) as url, TcpProxy(int(url.rstrip("/").rpartition(":")[2])) as proxy:

            def cut_in_the_middle(data: bytes, to_server: bool) -> bytes:
                if to_server:
                    requests.append(data)
                elif b'data: " 12"' in data and len(cuts) < 1:
                    cuts.append(data)
                    proxy.cut()
                    return b""
                return data

            cuts: list[bytes] = []
            proxy.filter = cut_in_the_middle
            await browser.open(f"http://127.0.0.1:{proxy.port}/")
            await browser.shows("document.forms.length === 1")
            await browser.evaluate("document.forms[0].submit()")
            await browser.shows("document.getElementById('state')?.value === 'SUCCESS'")
            await browser.shows(f"document.getElementById('text').textContent === {json.dumps(TEXT)}")
            assert cuts
            resumed = [request for request in requests if b"last-event-id:" in request.lower()]
            assert len(resumed) == 1
            assert b"/output" in resumed[0]
            await browser.shows("document.getElementById('bar').value === document.getElementById('bar').max")
            await browser.reload()
            await browser.shows("document.getElementById('state')?.value === 'SUCCESS'")
            await browser.shows(f"document.getElementById('text').textContent === {json.dumps(TEXT)}")
        async with example(NEVER) as url:
            await browser.open(url)
            await browser.shows("document.forms.length === 1")
            await browser.evaluate("document.forms[0].submit()")
            await browser.shows(f"document.getElementById('bar')?.max === {len(TEXT.split(' '))}")
            await browser.shows("document.getElementById('text').textContent === '20'")
            await browser.reload()
            await browser.shows("document.getElementById('bar')?.value === 1")
            await browser.evaluate("document.getElementById('stop').click()")
            await browser.shows("document.getElementById('state').value === 'REVOKED'")
            error = await browser.evaluate("document.getElementById('error').textContent")
            assert error == "TaskRevokedError: stopped in the browser"
