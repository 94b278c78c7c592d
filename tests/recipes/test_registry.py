"""How a recipe is made from another one: changes by dotted path, and another method with shared settings."""

from dataclasses import replace

import pytest

from jepax.methods.ijepa import IJEPAConfig
from jepax.methods.ijepa_no_teacher import IJEPANoTeacherConfig
from jepax.methods.lejepa import LeJEPAConfig
from jepax.methods.visreg import VISRegConfig
from jepax.nn import ViTConfig
from jepax.recipes import RECIPES
from jepax.recipes.registry import override, recipe, with_method
from jepax.training.config import Config
from jepax.types import UserError
from jepax.views import CropConfig

BASE = Config(method=IJEPAConfig(encoder=ViTConfig(width=48, num_heads=3)))


def test_a_recipe_is_registered_under_the_name_of_its_function(monkeypatch):
    monkeypatch.setattr("jepax.recipes.registry.RECIPES", registered := {})

    @recipe
    def mine() -> Config:
        """Mine."""
        return BASE

    assert registered == {"mine": mine} and mine() == replace(BASE, recipe="mine") and mine.__doc__ == "Mine."
    assert all(name == function.__name__ for name, function in RECIPES.items())


def test_fields_change_at_any_depth_and_all_others_stay():
    changed = override(BASE, {"seed": 3, "method.encoder.depth": 4, "method.loss": "l2", "method.crop": CropConfig()})
    encoder = ViTConfig(width=48, num_heads=3, depth=4)
    assert changed == replace(BASE, seed=3, method=replace(BASE.method, encoder=encoder, loss="l2", crop=CropConfig()))


def test_fields_of_one_group_are_checked_together():
    both = {"method.encoder.width": 50, "method.encoder.num_heads": 5}
    assert override(BASE, both).method.encoder.num_heads == 5
    with pytest.raises(UserError, match="num_heads=5 does not divide width=48"):
        override(BASE, {"method.encoder.num_heads": 5})


def test_an_unknown_field_is_an_error():
    with pytest.raises(TypeError, match="depht"):
        override(BASE, {"method.encoder.depht": 4})


def test_another_method_keeps_the_fields_that_both_have():
    base = replace(BASE, method=LeJEPAConfig(encoder=BASE.method.encoder, num_slices=64, sigreg_weight=0.5))
    changed = with_method(base, VISRegConfig, scale_weight=2.0)
    assert changed == replace(base, method=VISRegConfig(encoder=BASE.method.encoder, num_slices=64, scale_weight=2.0))
    assert with_method(base, VISRegConfig, num_slices=8).method.num_slices == 8


def test_a_method_that_needs_what_the_other_lacks_gets_its_default():
    """A variant without a teacher has no schedule of one to pass on."""
    base = with_method(BASE, IJEPANoTeacherConfig)
    assert base.method.ema is None and with_method(base, IJEPAConfig).method.ema == IJEPAConfig().ema
