"""The sheet of views shows what the first training step sees."""

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest

from jepax.data import DataConfig
from jepax.methods.base import example_keys
from jepax.methods.lejepa import LeJEPAConfig
from jepax.nn import ViTConfig
from jepax.training.config import Config
from jepax.views import CropConfig, MultiCropConfig, denormalize
from jepax.viz import draw_figures
from jepax.viz.figures import first_views, load_first_images
from jepax.viz.views import plot_views

VIEWS = MultiCropConfig(
    num_global=2,
    global_crop=CropConfig(size=(16, 16), scale=(0.3, 1.0)),
    num_local=1,
    local_crop=CropConfig(size=(8, 8), scale=(0.05, 0.3)),
)


@pytest.fixture(scope="module")
def viewed():
    method = LeJEPAConfig(encoder=ViTConfig(patch_size=4, width=12, depth=1, num_heads=1), views=VIEWS)
    return Config(method=method, data=DataConfig(dataset="synthetic", canvas_size=32, synthetic_size=40), seed=3)


def test_each_cell_is_a_view_of_the_first_step(viewed):
    images = load_first_images(viewed)
    drawn = first_views(viewed, images)
    axes = np.reshape(plot_views(drawn, images, viewed.method.crop).axes, (8, 4))
    method = viewed.method.build(total_steps=1, key=jr.key(0))
    key = jr.fold_in(jr.fold_in(jr.key(viewed.seed), 1), 0)
    groups = eqx.filter_jit(method.draw)(images, example_keys(key, images.index)).groups
    views = [group[:, view] for group in groups for view in range(group.shape[1])]
    for column, view in enumerate(views, 1):
        expected = np.asarray(denormalize(view, VIEWS.global_crop))
        for row in range(8):
            shown = axes[row, column].images[0].get_array()
            np.testing.assert_allclose(shown, np.broadcast_to(expected[row], shown.shape), atol=1e-5)
    titles = [cell.get_title() for cell in axes[0]]
    assert [title.split(":")[0] for title in titles] == ["center", "global", "global", "local"]
    assert "8 \u00d7 8 px" in titles[3]


def test_a_run_gets_the_sheet(viewed, tmp_path):
    assert draw_figures(viewed, tmp_path) == [tmp_path / "figures" / "views.png"]
