"""Bounds on YAML from outside: how long a file may be, and how much its aliases may stand for.

Invariant: a file is refused before work on it grows beyond its length; ten lines of aliases can stand for 10^9 values.
Called by `config.load`, through which every YAML file of the package is read.
"""

from __future__ import annotations

from pathlib import Path

import yaml

MAX_BYTES = 2**18
MAX_VALUES = 10_000
"""A whole config has about 200. PyYAML reads 20,000 a second, and long text 500 KB a second."""

MAX_DEPTH = 50


class BeyondBoundsError(ValueError):
    """The YAML is longer, or stands for more, than any config."""


class BoundedLoader(yaml.SafeLoader):
    """Stops at MAX_VALUES values, aliases counted as one each, and at MAX_DEPTH values within each other."""

    _values = 0
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As PyYAML does, counted. Raises BeyondBoundsError."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise BeyondBoundsError(f"it holds more than {MAX_VALUES} values, so it is no config of tc-ray")
        if self._depth > MAX_DEPTH:
            raise BeyondBoundsError("nested too deeply for a config")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def increase_flow_level(self) -> None:
        """As PyYAML does, which looks ahead from each bracket and takes seconds for thousands of them. Raises as above."""
        if self.flow_level > MAX_DEPTH:
            raise BeyondBoundsError("nested too deeply for a config")
        super().increase_flow_level()  # type: ignore[misc]


def read_text(path: Path) -> str:
    """Content of a YAML file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read. BeyondBoundsError: it is longer than MAX_BYTES.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BeyondBoundsError(f"longer than {MAX_BYTES} bytes, so no config of tc-ray")
    return content.decode("utf-8-sig")


def check_values(root: yaml.Node) -> None:
    """Raise BeyondBoundsError where the document, each alias written out, has more than MAX_VALUES values, or no end."""
    values: dict[int, int] = {}
    under_way: set[int] = set()

    def count(node: yaml.Node) -> int:
        if id(node) in under_way:
            raise BeyondBoundsError(f"the alias in line {node.start_mark.line + 1} stands for itself")
        if id(node) not in values:
            under_way.add(id(node))
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            values[id(node)] = 1 + sum(map(count, parts))
            under_way.remove(id(node))
        return values[id(node)]

    if count(root) > MAX_VALUES:
        raise BeyondBoundsError(f"its aliases stand for more than {MAX_VALUES} values; write out what is meant")
