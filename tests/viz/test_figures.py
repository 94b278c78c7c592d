"""A run's folder gets its figures, whole or not at all."""

import json
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from PIL import Image

from jepax.viz import draw_figures, figures
from jepax.viz.figures import save_figure


def test_both_figures_are_drawn_into_the_run(config, tmp_path):
    lines = [{"step": step, "train/loss": 1.0, "optim/grad_norm": 2.0} for step in (0, 49, 99)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = draw_figures(config, tmp_path)
    assert paths == [tmp_path / "figures" / "curves.png", tmp_path / "figures" / "masks.png"]
    assert sorted((tmp_path / "figures").iterdir()) == paths
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 20


def test_views_of_another_type_have_no_figure(config, tmp_path):
    """Nor has a run without metrics."""
    method = SimpleNamespace(draw=lambda images, keys: {"canvas": images.canvas})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.eqx, "filter_eval_shape", lambda build: method)
        assert draw_figures(config, tmp_path) == []


def test_a_figure_that_fails_leaves_the_old_one(tmp_path):
    path = save_figure(Figure(), tmp_path / "figures" / "a.png")
    old = path.read_bytes()
    broken = Figure()
    broken.draw = lambda renderer: 1 / 0
    with pytest.raises(ZeroDivisionError):
        save_figure(broken, path)
    assert path.read_bytes() == old
