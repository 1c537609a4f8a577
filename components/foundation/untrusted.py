"""Text from outside: read within bounds, and shown in a message so that neither a terminal nor a log acts on it."""

from __future__ import annotations

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any, NoReturn

import yaml

MAX_TEXT_BYTES = 100_000_000
"""Of a record, a manifest or a description."""

MAX_YAML_CHARACTERS = 1_000_000
MAX_YAML_NODES = 100_000
"""Keys, values and lists of a YAML document, with what its aliases stand for."""

PROBLEMS_TOLD = 20
"""Of the fields that are refused in one file or command."""

_SHOWN = 200
_MOST_DIGITS = 100


def shown(value: Any) -> str:
    """The beginning of a value as Python writes it: on one line, with control characters as escapes."""
    text = _REPR.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(text: object) -> str:
    """The beginning of another program's words: on one line, without control characters."""
    words = " ".join(str(text)[: 2 * _SHOWN].split())
    return "".join(c if c.isprintable() else "\ufffd" for c in words)


def markdown_code(text: str) -> str:
    """Text in a Markdown page or a cell of a table: every renderer shows a code span as it is, and makes no link, image
    or element of it."""
    words = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split())) or "(empty)"
    fence = "`" * (max((len(run) for run in re.findall("`+", words)), default=0) + 1)
    space = " " if "`" in words else ""
    return f"{fence}{space}{words}{space}{fence}".replace("|", "\\|")


def parse_json(text: str) -> Any:
    """JSON, without NaN and Infinity, which are none.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str, *, more_may_follow: bool = False) -> Any:
    """YAML of plain values. libyaml is faster, and dies of a deep document.

    Args:
        more_may_follow: read the first of several documents.

    Raises:
        ValueError: it is not YAML, is nested too deeply, or unfolds to more than MAX_YAML_NODES.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"it is over {MAX_YAML_CHARACTERS} characters")
    try:
        if more_may_follow:
            return next(yaml.load_all(text, Loader=_BoundedLoader), None)
        return yaml.load(text, Loader=_BoundedLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(one_line(error)) from error
    except (LookupError, AttributeError, TypeError, OverflowError) as error:  # a tag on what it does not fit
        raise ValueError(f"a value does not fit its tag ({type(error).__name__})") from error


def read_yaml(path: Path) -> Any:
    """A file of YAML.

    Raises:
        OSError, ValueError: see `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path))


def read_text(path: Path) -> str:
    """A file of text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is over MAX_TEXT_BYTES, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{path} is over {MAX_TEXT_BYTES} bytes")
    return content.decode("utf-8")


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _SHOWN

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"  # more, Python refuses


_REPR = _Repr()


class _BoundedLoader(yaml.SafeLoader):
    """Reads aliases, unless a few lines of them stand for more than fits into memory; and numbers that are some."""

    def construct_document(self, node: yaml.Node) -> Any:
        if _unfolded(node, {}) > MAX_YAML_NODES:
            raise ValueError(f"it unfolds to more than {MAX_YAML_NODES} values: write it without aliases")
        return super().construct_document(node)


def _number(kind: str) -> Any:
    def construct(loader: _BoundedLoader, node: yaml.ScalarNode) -> Any:
        if len(node.value) > _MOST_DIGITS:
            raise ValueError(f"a number has more than {_MOST_DIGITS} digits")
        return getattr(loader, f"construct_yaml_{kind}")(node)

    return construct


for _kind in ("int", "float"):
    _BoundedLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number(_kind))


def _unfolded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes a tree of nodes has when every alias is written out; a node within itself has no end."""
    if id(node) not in known:
        known[id(node)] = math.inf
        entries = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
