"""Reads untrusted text files, with limits on size and depth, as plain values, without running code."""

import json
from pathlib import Path
from typing import Any

import yaml

from jepax.errors import UserError

MAX_YAML_BYTES = 1_000_000
"""Most bytes of a file; our own have a few thousand."""
MAX_DEPTH = 32
"""Most levels of mappings and lists in a YAML file."""
MAX_NODES = 20_000
"""Most keys, values and lists of a YAML file: each needs about a kilobyte while it is read."""
MAX_SCALAR_CHARS = 2_000
"""Most characters of one YAML value: far fewer than the digits at which Python refuses to parse integers."""


class _UnsafeYaml(yaml.YAMLError):
    """YAML that plain values do not need."""


class _StrictYamlLoader(yaml.SafeLoader):
    """Builds plain values, and stops at the first node that is tagged, shared, too deep, too long or over the limit."""

    depth = values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.values = self.depth + 1, self.values + 1
        event = self.peek_event()
        if why := self._why_not(event):
            raise _UnsafeYaml(f"line {event.start_mark.line + 1}: {why}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses duplicate keys, of which YAML itself silently uses the last value."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _UnsafeYaml(f"line {key.start_mark.line + 1}: duplicate key {printable(key.value)}; remove one")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node

    def _why_not(self, event: yaml.Event) -> str:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            return "anchors (&) and aliases (*) are not read; write the value out"
        if event.tag is not None:
            return f"tags such as {printable(event.tag)} are not read; write the plain value"
        if len(getattr(event, "value", "")) > MAX_SCALAR_CHARS:
            return f"a value is longer than {MAX_SCALAR_CHARS} characters"
        if self.values > MAX_NODES:
            return f"there are more than {MAX_NODES} values"
        return f"it is nested deeper than {MAX_DEPTH} levels" if self.depth > MAX_DEPTH else ""


def read_yaml(path: Path) -> Any:
    """Returns the plain values of a YAML file.

    Raises `UserError` naming the file if it is missing, too large, not YAML, has duplicate keys, is nested too deep, or
    has tags, anchors or aliases, with which a few lines expand to gigabytes.
    """
    content = read_text(path)
    try:
        return _StrictYamlLoader(content).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date or number
        raise UserError(f"{path} is not plain YAML: {' '.join(str(error).split())[:300]}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object. Raises `UserError` if it is missing, too large, too deep, not JSON, or not an object."""
    try:
        values = json.loads(read_text(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is no JSON that jepax reads: it is nested too deep") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__} and no keys; fetch or export it again")
    return values


def read_text(path: Path) -> str:
    """Returns the text. Raises `UserError` if it cannot be read, is not text, or is larger than `MAX_YAML_BYTES`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)  # not the size from `stat`: devices and pipes have none
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_YAML_BYTES:
        raise UserError(f"{path} is larger than {MAX_YAML_BYTES / 1e6:g} MB, as no config is; give another file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: not text") from error


def printable(value: object, longest: int = 60) -> str:
    """Formats a file's value for an error: on one line, short, without a terminal's control characters."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) < longest else text[: longest - 3] + "..."
