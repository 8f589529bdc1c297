"""Sockets that are not ours to use any more."""

from __future__ import annotations

import os
import socket
from asyncio import BaseTransport
from contextlib import suppress

__all__ = ["silence"]


def silence(transport: BaseTransport) -> None:
    """Take the socket of ``transport`` away from it, without its event loop.

    For transports whose event loop has ended, and for those that a child process was forked with. There the socket is
    shared with the parent, and so is the epoll instance that watches it: closing the transport would unregister the
    parent's socket, and writing to it would send the server half of two conversations. With the null device in its
    place, neither can happen, whatever still holds the transport.
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
