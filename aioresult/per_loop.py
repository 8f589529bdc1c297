"""`per_loop`: an open backend for each event loop, for frameworks that run each request in its own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from threading import Lock
from typing import Unpack

from .backends.base import Backend
from .exceptions import ImproperlyConfigured
from .registry import ConnectOptions, connect
from .remedies import kind_of
from .tasks import SingleFlight

__all__ = ["PerLoop", "per_loop"]


def per_loop(url: str | Callable[[], Backend], **options: Unpack[ConnectOptions]) -> PerLoop:
    """Make an object that holds one open backend for each event loop.

    A backend is opened when its event loop first asks for it, and closed when that loop ends. A backend belongs to the
    event loop that opened it. Django's ``runserver``, WSGI and tests run each request in its own event loop, so a
    module cannot hold one open backend there. It can hold this object instead::

        results = aioresult.per_loop("redis://localhost:6379/0")

        async def view(request, task_id):
            backend = await results.current()
            return JsonResponse({"value": await backend.result(task_id).get(timeout=30)})

    :param url: the same as for `aioresult.connect`. Or a callable without arguments that returns a new backend, not yet
        open, such as ``functools.partial(aioresult.celery.backend_from_app, app)``.
    :param options: the same as for `aioresult.connect`.
    :raises ImproperlyConfigured: the same as from `aioresult.connect`. It is raised by this call, which does no I/O.
    """
    if not isinstance(url, str):
        if not callable(url):
            raise ImproperlyConfigured(
                f"per_loop takes a URL, or a function without arguments that returns a new backend; not {kind_of(url)}"
            )
        if options:
            raise ImproperlyConfigured(
                f"per_loop takes options beside a URL alone; give {', '.join(sorted(options))} to the backend in your "
                f"function"
            )
        return PerLoop(url)
    connect(url, **options)  # a mistake in the URL or an option raises here, and not in the first request
    return PerLoop(lambda: connect(url, **options))


class PerLoop:
    """Holds one open backend for each event loop; see `aioresult.per_loop`. May be used from any thread."""

    def __init__(self, make: Callable[[], Backend]) -> None:
        self._make = make
        self._lock = Lock()
        self._held: dict[asyncio.AbstractEventLoop, _Held] = {}

    async def current(self) -> Backend:
        """Return the open backend of the running event loop. The first call in a loop opens it.

        Calls that arrive during the opening wait for it. The backend is closed at the end of the loop, when the loop
        shuts down its asynchronous generators: `asyncio.run` and the servers that use it do that. If the backend was
        closed before, this call opens it again.

        :raises BackendConnectionError: the server cannot be reached. The next call tries again.
        :raises BackendClosedError: `aclose` was called meanwhile. The next call opens a new backend.
        """
        loop = asyncio.get_running_loop()
        held = self._held.get(loop)
        if held is None:
            held = _Held(self._make(), partial(self._forget, loop))
            with self._lock:
                ended = [self._held.pop(each) for each in tuple(self._held) if each.is_closed()]
                self._held[loop] = held
            for each in ended:  # their loops ended without closing their asynchronous generators
                await each.backend.aclose()
        if not held.backend.is_open:
            await held.open()
        return held.backend

    async def aclose(self) -> None:
        """Close the backend of the running event loop, if there is one. After that, `current` opens a new one."""
        loop = asyncio.get_running_loop()
        held = self._held.get(loop)
        if held is not None:
            self._forget(loop, held)  # before closing: a call of `current` meanwhile must open a new backend
            await held.aclose()

    def _forget(self, loop: asyncio.AbstractEventLoop, held: _Held) -> None:
        with self._lock:
            if self._held.get(loop) is held:
                del self._held[loop]


class _Held:
    """Holds the backend of one event loop. Calls ``forget`` when the loop ends."""

    def __init__(self, backend: Backend, forget: Callable[[_Held], None]) -> None:
        self.backend = backend
        self.closing: AsyncGenerator[None, None] = self._closing()
        self.open: SingleFlight[None] = SingleFlight(self._open)
        self._forget = forget
        self._began = self._ended = False

    async def aclose(self) -> None:
        """Close the backend. An attempt to open it ends with `BackendClosedError`."""
        self._ended = True
        await self.open.stop()
        await self.backend.aclose()
        await self.closing.aclose()

    async def _open(self) -> None:
        if self._ended:
            raise self.backend._closed()
        if not self.backend.is_open:
            await self.backend.open()
        if not self._began:
            self._began = True
            await anext(self.closing)

    async def _closing(self) -> AsyncGenerator[None, None]:
        """Close the backend at the end of the loop.

        A loop that ends closes the asynchronous generators that were begun in it. That runs the ``finally`` below.
        """
        try:
            yield
        finally:
            self._forget(self)
            await self.backend.aclose()
