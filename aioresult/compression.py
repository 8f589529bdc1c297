r"""Compresses stored values in the format of Celery 5.7 (``celery/backends/base.py``: ``compress_payload``).

A stored value has no headers. So a marker and the content type, which names the compression, precede the compressed
bytes: ``\x00celery-compressed\x00`` + content type + ``\x00`` + compressed bytes. No serializer's output begins with a
NUL. A reader decides by the marker alone, and ignores its own setting for compression. It never unpacks more than a
maximum size, because a few kilobytes can unpack to gigabytes.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .exceptions import ImproperlyConfigured, ResultTooLargeError

__all__ = ["compress", "compressor", "decompress"]

_MAGIC = b"\x00celery-compressed\x00"


class _Decompressor(Protocol):
    """The attributes of the decompressors of `zlib`, `bz2`, `lzma` and `zstd` that this module uses."""

    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, /, max_length: int = -1) -> bytes: ...


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise ImproperlyConfigured(
            "compression 'zstd' needs Python 3.14 or backports.zstd; "
            "install it with: pip install 'aioresult-tasks[zstd]'"
        ) from None
    return zstd


#: Content type → (function that compresses, function that makes a decompressor). The content types are the same as in
#: kombu, whose "gzip" is a plain zlib stream.
_METHODS: Mapping[str, tuple[Callable[[bytes], bytes], Callable[[], _Decompressor]]] = {
    "application/x-gzip": (zlib.compress, zlib.decompressobj),
    "application/x-bz2": (bz2.compress, bz2.BZ2Decompressor),
    "application/x-lzma": (lzma.compress, lzma.LZMADecompressor),
    "application/zstd": (lambda data: bytes(_zstd().compress(data)), lambda: _zstd().ZstdDecompressor()),
}
_ALIASES = {
    "gzip": "application/x-gzip",
    "zlib": "application/x-gzip",
    "bzip2": "application/x-bz2",
    "bzip": "application/x-bz2",
    "bz2": "application/x-bz2",
    "lzma": "application/x-lzma",
    "xz": "application/x-lzma",
    "zstd": "application/zstd",
    "zstandard": "application/zstd",
}


def compressor(name: str) -> str:
    """Return the content type for the name of a compression: ``application/x-gzip`` for ``gzip``.

    Raises `ImproperlyConfigured` if the name is not known, or a package that the compression needs is not installed.
    """
    content_type = _ALIASES.get(name, name)
    if content_type not in _METHODS:
        raise ImproperlyConfigured(f"unknown compression {name!r}; known are {', '.join(sorted(_ALIASES))}")
    if content_type == "application/zstd":
        _zstd()
    return content_type


def compress(data: bytes, content_type: str) -> bytes:
    """Compress ``data`` and return it with the marker in front. ``content_type`` is a return value of `compressor`."""
    return b"".join((_MAGIC, content_type.encode(), b"\x00", _METHODS[content_type][0](data)))


def decompress(data: bytes, max_size: int) -> bytes:
    """Unpack ``data`` if it begins with the marker; otherwise return it unchanged.

    Raises `ResultTooLargeError` if the returned data would be larger than ``max_size`` bytes. Raises `ValueError` if
    the compression is unknown or the compressed data is incomplete. If the data is damaged, the error comes from the
    library that unpacks it, such as `zlib.error`.
    """
    if data.startswith(_MAGIC):
        content_type, _, body = data[len(_MAGIC) :].partition(b"\x00")
        name = content_type.decode("ascii")
        if name not in _METHODS:
            raise ValueError(f"unknown compression {name!r}")
        unpack = _METHODS[name][1]()
        data = unpack.decompress(body, max_size + 1)
        if len(data) <= max_size and not unpack.eof:
            raise ValueError(f"the {name} stream is incomplete")
    if len(data) > max_size:
        raise ResultTooLargeError(f"larger than max_result_size={max_size:,} bytes")
    return data
