"""The paths of a job file: which keys are paths, `$VAR` and `~` in them, what they can be.

In a job file `$VAR`, `${VAR}`, `~` and `~user` stand for what they stand for in a shell, and
`$$` for a dollar. job.json, which is read as a job file again, has every dollar doubled.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Keys whose value is a path or a list of paths.
PATHS = (
    "data.train",
    "data.cache_dir",
    "model.path",
    "run.dir",
    "container.image",
    "container.bind",
    "container.python",
)

# Bytes of one name, and of a run directory: what lies in it needs some of the 4,096 that a path
# may have.
MOST_NAME = 255
MOST_PATH = 3800

# A newline is a legal part of a name, and quoted wherever a path goes.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})?", re.ASCII)


def change(values: dict[str, Any], new: Callable[[str, str], str]) -> None:
    """Replace every path among the raw values of a job in place.

    Args:
        new: from (key, path) to a path; the key of an item of a list ends with its number.
            Anything of a wrong type is left to validation.
    """
    for key in PATHS:
        section, _, last = key.partition(".")
        inner = values.get(section)
        if not isinstance(inner, dict):
            continue
        given = inner.get(last)
        if isinstance(given, str):
            inner[last] = new(key, given)
        elif isinstance(given, list):
            inner[last] = [
                new(f"{key}.{index}", item) if isinstance(item, str) else item
                for index, item in enumerate(given)
            ]


def substitute(text: str, environ: Mapping[str, str]) -> str:
    """Expand variables, then a leading `~`.

    Raises:
        ValueError: a variable is unset or empty, or the text is none that a shell expands alike.
    """

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        name = match[2] or match[3]
        if name is None:
            raise ValueError(
                f"{match.string[match.start() :][:20]!r} is no variable; write $NAME or ${{NAME}}, "
                "and $$ for a dollar"
            )
        if not environ.get(name):
            state = "empty" if name in environ else "not set"
            raise ValueError(f"the variable {name} is {state}; set it, or write $$ for a dollar")
        return environ[name]

    text = _VARIABLE.sub(value, text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is not UTF-8 text") from None
    if not text.startswith("~"):
        return text
    user = text.split("/")[0]
    if user == "~" and environ.get("HOME") == "":
        raise ValueError("~ is not known: HOME is empty")
    try:
        return str(Path(user).expanduser()) + text[len(user) :]
    except RuntimeError:
        raise ValueError(
            "~ is not known: HOME is not set, and this user has no entry in the password file"
            if user == "~"
            else f"{user}: there is no such user; ./{user} is a folder of this name"
        ) from None


def escape(path: str) -> str:
    """A path as it is written in a job file, where a dollar begins a variable."""
    return path.replace("$", "$$")


def unescape(path: str) -> str:
    return path.replace("$$", "$")


def fault(path: str) -> str | None:
    """Why nothing can have this path, or None."""
    if found := _CONTROL.search(path):
        return f"{path!r} has a control character ({found[0]!r})"
    if len(path.encode()) > MOST_PATH:
        return f"{len(path.encode()):,} bytes are more than a path can have ({path[:60]!r}...)"
    for name in path.split("/"):
        if len(name.encode()) > MOST_NAME and not glob.has_magic(name):
            return (
                f"a name in it has {len(name.encode()):,} bytes, and file systems take "
                f"{MOST_NAME}: {name[:60]!r}..."
            )
    return None


def folder_fault(path: Path) -> str | None:
    """Why no folder can be made at a path, or be there already; None where one can."""
    for place in (path, *path.parents):
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{place}: {error.strerror}"
        if os.path.isdir(place):
            return None
        if os.path.islink(place):
            return f"{place} is a link to {os.readlink(place)}, and there is no such folder"
        return f"{place} is a file, not a folder"
    return None


def expand(pattern: str) -> list[Path]:
    """The files of one entry of `data.train`, sorted."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    return sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))


def unreadable(pattern: str) -> str | None:
    """What keeps this user from seeing what a path or pattern names; None: nothing, it is empty."""
    fixed: list[str] = []
    for name in pattern.split("/"):
        if glob.has_magic(name) and not os.path.lexists("/".join([*fixed, name])):
            break
        fixed.append(name)
    place = "/".join(fixed) or "/"
    try:
        os.stat(place)
        if os.path.isdir(place):
            os.scandir(place).close()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{place}: {error.strerror}"
    return f"{place} is a folder" if place == pattern and os.path.isdir(place) else None


def given(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every path among the raw values of a job, with its key."""
    found: list[tuple[str, str]] = []

    def note(key: str, path: str) -> str:
        found.append((key, path))
        return path

    change(values, note)
    yield from found
