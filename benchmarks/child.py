"""The process in which one measurement runs, or in which its results are stored: ``python -m benchmarks.child SPEC``.

SPEC is JSON: ``subject``, ``url``, ``options``, and either ``work`` with its ``params`` or, for a storer, neither. Each
measurement has a fresh process, so that none inherits the memory, the caches or the connections of another.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from .channel import Channel, standard
from .stalls import stall
from .storer import serve
from .subject import Unsupported, load
from .work import WORKS, Bench


async def _main(spec: dict[str, Any]) -> None:
    channel = await standard()
    try:
        await channel.send(await _run(spec, channel))
    except Unsupported as exc:
        await channel.send({"unsupported": str(exc)})
    except Exception as exc:
        await channel.send({"error": f"{type(exc).__name__}: {exc}"[:300]})


async def _run(spec: dict[str, Any], channel: Channel) -> dict[str, Any]:
    subject = load(spec["subject"], spec["url"], spec["options"])
    await subject.open()
    try:
        if "work" not in spec:
            return await serve(subject, channel)
        bench = Bench(subject, spec, channel)
        try:
            work = stall if spec["work"] == "stall" else WORKS[spec["work"]]
            return {"figures": await work(bench, **spec["params"])}
        finally:
            await bench.close()
    finally:
        await subject.close()


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
