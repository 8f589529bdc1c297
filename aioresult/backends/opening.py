"""The attempts to reach the server while a backend is being opened."""

from __future__ import annotations

import asyncio
import logging

from ..exceptions import BackendConnectionError
from ..retry import Backoff
from .contract import BackendContract

__all__ = ["connect_patiently"]

logger: logging.Logger = logging.getLogger("aioresult")


async def connect_patiently(backend: BackendContract) -> None:
    """Await ``backend._open()``, and retry it for ``wait_for_server`` seconds while the server cannot be reached.

    Raises the `BackendConnectionError` of the last attempt. Any other error ends the attempts at once.
    """
    now = asyncio.get_running_loop().time
    began, backoff, patience = now(), Backoff(), backend.wait_for_server
    attempts = 0
    while True:
        try:
            await backend._open()
            break
        except BackendConnectionError as exc:
            left = began + patience - now()
            if left <= 0:
                if not patience:
                    raise
                raise BackendConnectionError(f"{exc} (after trying for wait_for_server={patience:g} seconds)") from exc
            if not attempts:
                logger.warning("%s; open() tries again for up to wait_for_server=%g seconds", exc, patience)
        attempts += 1
        await backend._close()
        await asyncio.sleep(min(backoff.pause(), left))
    if attempts:
        logger.info("%s was reached after %.1f s", backend.as_uri(), now() - began)
