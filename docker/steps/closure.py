"""closure.py NAME...: these packages and all that they require, as installed, one a line."""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(names: list[str]) -> list[str]:
    found: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(name), "") for name in names]
    while waiting:
        name, extra = entry = waiting.pop()
        if entry in found:
            continue
        found.add(entry)
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), e) for e in ("", *needed.extras)]
    return sorted({name for name, _ in found})


if __name__ == "__main__":
    print("\n".join(closure(sys.argv[1:])))
