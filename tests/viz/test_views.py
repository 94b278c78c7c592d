"""The sheet of views shows what the first training step sees."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.data import DataConfig
from jepax.methods.lejepa import LeJEPAConfig
from jepax.nn import ViTConfig
from jepax.views import CropConfig, MultiCropConfig, denormalize
from jepax.viz import draw_figures
from jepax.viz.figures import load_first_images
from jepax.viz.views import plot_views

VIEWS = MultiCropConfig(
    globals=2,
    global_crop=CropConfig(size=(16, 16), scale=(0.3, 1.0)),
    locals=1,
    local_crop=CropConfig(size=(8, 8), scale=(0.05, 0.3)),
)


@pytest.fixture(scope="module")
def viewed():
    method = LeJEPAConfig(encoder=ViTConfig(patch_size=4, width=12, depth=1, heads=1), views=VIEWS)
    return SimpleNamespace(method=method, data=DataConfig(source="synthetic", canvas=32, synthetic_images=40), seed=3)


def test_each_cell_is_a_view_of_the_step_with_that_key(viewed):
    images, key = load_first_images(viewed), jr.key(5)
    axes = np.reshape(plot_views(viewed.method, images, key).axes, (8, 4))
    groups = jax.jit(lambda images: viewed.method.draw_views(images, key=key))(images)
    views = [*groups[0], *groups[1]]
    for column, view in enumerate(views, 1):
        expected = np.asarray(denormalize(view, VIEWS.global_crop))
        for row in range(8):
            shown = axes[row, column].images[0].get_array()
            np.testing.assert_allclose(shown, np.broadcast_to(expected[row], shown.shape), atol=1e-5)
    titles = [cell.get_title() for cell in axes[0]]
    assert [title.split(":")[0] for title in titles] == ["centre", "global", "global", "local"]
    assert "8 \u00d7 8 px" in titles[3]


def test_the_loss_sees_the_same_views(viewed, monkeypatch):
    method = viewed.method.build(total_steps=1, key=jr.key(0))
    asked = []

    def draw_views(self, images, *, key):
        asked.append(key)
        return (jnp.zeros((2, 8, 16, 16, 3)),)

    monkeypatch.setattr(type(viewed.method), "draw_views", draw_views)
    method.loss(load_first_images(viewed), key=jr.key(5))
    assert asked == [jr.key(5)]


def test_a_run_gets_the_sheet(viewed, tmp_path):
    assert draw_figures(viewed, tmp_path) == [tmp_path / "figures" / "views.png"]
