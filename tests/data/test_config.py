"""Settings are checked where they are written, and splits share no picture."""

import numpy as np
import pytest

from jepax.data import DataConfig, open_source
from jepax.data.sources import split_rows, val_mask
from jepax.types import UserError


@pytest.mark.parametrize(
    "name, value",
    [
        ("dataset", "imagenet"),
        ("channels", 4),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("max_corrupt_fraction", 1.5),
        ("max_corrupt_fraction", -0.1),
        ("canvas_size", 0),
        ("synthetic_size", 0),
        ("synthetic_seed", -1),
        ("num_threads", -1),
        ("num_workers", -1),
    ],
)
def test_a_bad_setting_is_named_with_its_value(name, value):
    config = DataConfig()
    object.__setattr__(config, name, value)  # the constructor's type check, on in tests only, would be first to object
    with pytest.raises(UserError, match=rf"data\.{name}={value} "):
        config.__post_init__()


def test_image_folder_needs_a_root():
    with pytest.raises(UserError, match=r"data\.root=None"):
        open_source(DataConfig(dataset="image_folder"), "train")


def test_held_out_rows_are_a_fixed_balanced_share():
    labels = np.repeat(np.arange(4, dtype=np.int32), 50)
    marks = val_mask(labels, 0.1)
    assert np.bincount(labels[marks]).tolist() == [5, 5, 5, 5]
    np.testing.assert_array_equal(marks, val_mask(labels, 0.1))
    assert np.all(marks <= val_mask(labels, 0.3))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_train_and_validation_part_the_pool(share):
    labels = np.arange(40, dtype=np.int32) % 3
    train = split_rows("train", labels, share)
    validation = np.flatnonzero(val_mask(labels, share))
    assert sorted([*train, *validation]) == list(range(40))


def test_an_empty_validation_split_is_refused():
    config = DataConfig(dataset="synthetic", canvas_size=8, val_fraction=0.0, synthetic_size=16)
    assert len(open_source(config, "train")) == 16
    with pytest.raises(UserError, match=r"data\.val_fraction=0\.0 leaves no image for the validation split"):
        open_source(config, "validation")
