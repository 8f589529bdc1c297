"""Detaches sockets that this process must not use any more."""

from __future__ import annotations

import os
import socket
from asyncio import BaseTransport
from contextlib import suppress

__all__ = ["silence"]


def silence(transport: BaseTransport) -> None:
    """Replace the socket of ``transport`` with the null device, without using its event loop.

    Call it for transports whose event loop has ended, and for transports that a child process has inherited by a fork.
    The child shares the socket with its parent, and also the epoll instance that watches it. If the child closed the
    transport, it would unregister the parent's socket. If it wrote to the transport, the server would get a mixture of
    two conversations. With the null device neither can happen, whatever still refers to the transport.
    """
    connection = transport.get_extra_info("socket")
    if not isinstance(connection, socket.socket) and not hasattr(connection, "fileno"):
        return
    number = connection.fileno()
    if number < 0:
        return
    with suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, number, inheritable=False)
        os.close(null)
