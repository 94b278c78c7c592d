"""Files are written in one encoding, whatever the locale, and any text can be written."""

import pytest

from jepax.io import atomic


@pytest.mark.parametrize("write", [atomic.atomic_write, atomic.append_text])
def test_text_that_is_not_unicode_is_escaped(write, tmp_path):
    write(tmp_path / "a.txt", "74.2 ± 0.3 of caf\udce9.jpg\n")
    assert (tmp_path / "a.txt").read_bytes() == "74.2 ± 0.3 of caf\\udce9.jpg\n".encode()
