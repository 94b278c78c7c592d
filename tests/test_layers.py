"""Imports go downward only."""

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_imports_go_downward_only(capsys):
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS, capsys.readouterr().out
