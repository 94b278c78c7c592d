"""Manifests with the sha256 of each file of a folder, written last; a folder that differs is corrupt."""

import hashlib
import json
from pathlib import Path
from typing import Any

from jepax.io import atomic

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Flush the folder's files to the disk, then write the manifest, with `content`."""
    for path in [*folder.rglob("*"), folder]:
        atomic.fsync(path)
    content = content | {"sha256": compute_checksums(folder)}
    manifest = {"content": content, "sha256": _content_digest(content)}  # the manifest's own checksum
    atomic.atomic_write(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    atomic.fsync(folder)


def read_content(folder: Path) -> dict[str, Any]:
    """The content, with the checksums by path in the folder under "sha256"; unchecked."""
    return json.loads((folder / MANIFEST_FILE).read_text())["content"]


def verify(folder: Path) -> list[str]:
    """List the errors of the folder; empty if it is as written."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        expected = manifest["content"]["sha256"]
        if _content_digest(manifest["content"]) != manifest["sha256"]:
            raise ValueError
    except FileNotFoundError:
        return [f"{MANIFEST_FILE} is missing"]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST_FILE} is not what was written"]
    found = compute_checksums(folder)
    missing = [f"{name} is missing" for name in expected if name not in found]
    changed = [name for name in found if found[name] != expected.get(name, found[name])]
    return missing + [f"{name} is not what was written" for name in changed]


def compute_checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file but the manifest, by its path in the folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    return {str(path.relative_to(folder)): _sha256(path) for path in found}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
