"""How much memory a process uses. Of the standard library this needs what an interpreter has loaded anyway."""

import resource
import sys

__all__ = ["resident_bytes"]


def resident_bytes() -> int:
    """Bytes of memory in use now; the highest so far where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
