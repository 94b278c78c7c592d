"""Manifests: the sha256 sum of each file in a folder, written last. A folder that is not as its says was damaged."""

import hashlib
import json
from pathlib import Path
from typing import Any

from jepax import files

FILE = "manifest.json"


def write(folder: Path, content: dict[str, Any]) -> None:
    """Puts what the folder holds on the disk, then the manifest, which holds `content` too."""
    for path in [*folder.rglob("*"), folder]:
        files.sync(path)
    content = content | {"sha256": sums(folder)}
    files.write(folder / FILE, json.dumps({"content": content, "sha256": _digest(content)}, indent=1) + "\n")
    files.sync(folder)


def content(folder: Path) -> dict[str, Any]:
    """What was written there, and under "sha256" the sum of each file by its path in the folder; not checked."""
    return json.loads((folder / FILE).read_text())["content"]


def problems(folder: Path) -> list[str]:
    """What is wrong with the folder, in words; nothing, if it is what was written."""
    try:
        manifest = json.loads((folder / FILE).read_text())
        if _digest(manifest["content"]) != manifest["sha256"]:
            return [f"{FILE} is not what was written"]
        wanted = manifest["content"]["sha256"]
    except FileNotFoundError:
        return [f"{FILE} is missing"]
    except (ValueError, KeyError, TypeError):
        return [f"{FILE} is not what was written"]
    found = sums(folder)
    missing = [f"{name} is missing" for name in wanted if name not in found]
    return missing + [
        f"{name} is not what was written" for name in wanted if found.get(name, wanted[name]) != wanted[name]
    ]


def sums(folder: Path) -> dict[str, str]:
    """sha256 of each file but the manifest, by its path in the folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    return {str(path.relative_to(folder)): _sha256(path) for path in found}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
