"""A progress bar on standard error."""

from __future__ import annotations

import sys
from time import monotonic

__all__ = ["Progress"]

_WIDTH = 24


class Progress:
    """``total`` steps; on a terminal one line that is written over, else nothing."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = monotonic()
        self._shown = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """``what`` begins."""
        filled = _WIDTH * self._done // self._total
        seconds = int(monotonic() - self._began)
        bar = "█" * filled + "·" * (_WIDTH - filled)
        self._write(f"{bar} {self._done}/{self._total}  {seconds // 60}:{seconds % 60:02}  {what}"[:119])
        self._done += 1

    def clear(self) -> None:
        """Make room for other output."""
        self._write("")

    def _write(self, line: str) -> None:
        if self._shown:
            sys.stderr.write(f"\r\x1b[2K{line}")
            sys.stderr.flush()
