"""Manifests: what a folder was, and what is not so any more."""

import pytest

from jepax.io import checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_text("one")
    (tmp_path / "inner/b").write_text("two")
    checksums.write_manifest(tmp_path, {"step": 3})
    return tmp_path


def test_what_was_written_has_no_problem(folder):
    assert checksums.verify(folder) == []
    assert checksums.read_content(folder)["step"] == 3
    assert sorted(checksums.read_content(folder)["sha256"]) == ["a", "inner/b"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "inner", checksums.MANIFEST_FILE]


def test_each_damage_is_named(folder):
    (folder / "a").write_text("ome")
    (folder / "inner/b").unlink()
    assert checksums.verify(folder) == ["inner/b is missing", "a is not what was written"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"content": {}, "sha256": ""}', "nothing"])
def test_a_manifest_of_another_form_is_a_problem(folder, text):
    (folder / checksums.MANIFEST_FILE).write_text(text)
    assert checksums.verify(folder) == ["manifest.json is not what was written"]


def test_a_missing_manifest_is_a_problem(folder):
    (folder / checksums.MANIFEST_FILE).unlink()
    assert checksums.verify(folder) == ["manifest.json is missing"]
