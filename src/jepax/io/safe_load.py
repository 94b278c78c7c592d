"""Reads untrusted text files, with limits on size and depth, as plain values, without running code."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from jepax.errors import UserError

MAX_YAML_BYTES = 1_000_000
"""Most bytes of a file; our own have a few thousand."""
MAX_DEPTH, MAX_NODES, MAX_SCALAR_CHARS = 32, 5_000, 2_000
"""Most levels and values of a YAML file, each of which needs about a kilobyte of memory, and characters of a value."""


class _StrictYamlLoader(yaml.SafeLoader):
    """Builds plain values. Stops at the first node with a tag or anchor, beyond a limit, or with a duplicate key."""

    depth = values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.values = self.depth + 1, self.values + 1
        event = self.peek_event()
        if problem := self._problem(event):
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: {problem}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Of duplicate keys YAML itself silently uses the last value.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: duplicate key {printable(key.value)}; remove one")
            seen.add(key.value)
        return node

    def _problem(self, event: yaml.Event) -> str:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            return "anchors (&) and aliases (*) are not read; write the value out"
        if event.tag is not None:
            return f"tags such as {printable(event.tag)} are not read; write the plain value"
        if len(getattr(event, "value", "")) > MAX_SCALAR_CHARS:
            return f"a value is longer than {MAX_SCALAR_CHARS} characters"
        if self.values > MAX_NODES:
            return f"there are more than {MAX_NODES} values"
        return f"it is nested deeper than {MAX_DEPTH} levels" if self.depth > MAX_DEPTH else ""


# As in YAML 1.2. PyYAML follows 1.1, where on, off, yes and no are booleans too: `on_spike: off` would be False.
_BOOL = "tag:yaml.org,2002:bool"
_StrictYamlLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if tag != _BOOL]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictYamlLoader.add_implicit_resolver(_BOOL, re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file.

    Raises `UserError` naming the file if it is missing, too large, not YAML, has duplicate keys, is nested too deep, or
    has tags, anchors or aliases, with which a few lines expand to gigabytes.
    """
    content = read_text(path)
    try:
        return _StrictYamlLoader(content).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date or number
        raise UserError(f"{path} is not plain YAML: {' '.join(str(error).split())[:300]}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises `UserError` if it is missing, too large, too deep, not JSON, or not an object."""
    content = read_text(path)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is no JSON that jepax reads: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} has no keys, only a {type(values).__name__}; fetch or export it again")
    return values


def read_text(path: Path) -> str:
    """Return the text. Raises `UserError` if it cannot be read, is not text, or is larger than `MAX_YAML_BYTES`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)  # not the size from `stat`: devices and pipes have none
        if len(content) > MAX_YAML_BYTES:
            raise UserError(f"{path} is larger than {MAX_YAML_BYTES / 1e6:g} MB, as no config is; give another file")
        return content.decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: not text") from error


def printable(value: object, longest: int = 60) -> str:
    """Format a file's value for an error: on one line, short, without a terminal's control characters."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) < longest else text[: longest - 3] + "..."
