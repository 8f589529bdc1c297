"""An event source as a browser has it: the WHATWG's text, section 9.2.6, "Interpreting an event stream", in Python."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, NamedTuple


class Event(NamedTuple):
    name: str
    data: str
    last_id: str

    @property
    def value(self) -> Any:
        """The data, as a page reads it: strictly JSON."""
        return json.loads(self.data, parse_constant=_no_json)


def _no_json(text: str) -> Any:
    raise AssertionError(f"JSON.parse would not take {text}")


class EventSource:
    """The bytes of one connection after another become events; what a cut leaves unfinished is dropped."""

    def __init__(self) -> None:
        #: What the next connection sends as ``Last-Event-ID``, if it is not empty.
        self.last_id = ""
        #: Milliseconds before the browser reconnects.
        self.retry: int | None = None
        self.comments: list[str] = []
        self._connect()

    def _connect(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._first = True
        self._name = self._data = ""
        self._id = self.last_id

    def cut(self) -> None:
        """The connection has ended: "any pending data must be discarded"."""
        self._connect()

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data`` completes."""
        self._text += self._decoder.decode(data)
        if self._first and self._text:
            self._first = False
            self._text = self._text.removeprefix("\ufeff")
        events = []
        # A CR at the very end may be half of a CRLF.
        while found := re.search(r"\r\n|\n|\r(?=.)", self._text, re.DOTALL):
            line, self._text = self._text[: found.start()], self._text[found.end() :]
            if line:
                self._field(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        return events

    def _field(self, line: str) -> None:
        if line.startswith(":"):
            self.comments.append(line[1:])
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._name = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            self.retry = int(value)

    def _dispatch(self) -> Event | None:
        self.last_id = self._id
        name, data = self._name, self._data
        self._name = self._data = ""
        return Event(name or "message", data.removesuffix("\n"), self.last_id) if data else None
