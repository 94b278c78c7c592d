"""Reading, measured on generated photos."""

import numpy as np
import pytest
from PIL import Image

from jepax.bench import input_bench
from jepax.data import DataConfig, open_source


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_bench, "NUM_PHOTOS", 12)
        folder = tmp_path_factory.mktemp("photos")
        input_bench.generate_photos(folder)
        return folder


def test_generated_photos_are_as_large_as_photos_are(photos):
    files = sorted(photos.glob("train/photo/*.jpg"))
    sizes = set()
    for file in files:
        with Image.open(file) as image:
            sizes.add(image.size)
    assert len(files) == 12 and sizes == {(500, 375)}
    assert 20_000 < np.mean([file.stat().st_size for file in files]) < 200_000


def test_every_path_reads_every_photo(photos):
    files = sorted(photos.glob("train/photo/*.jpg"))
    assert min(input_bench.time_one_core(files, 512, 1).values()) > 0
    source = open_source(DataConfig(dataset="image_folder", root=str(photos), canvas_size=512), "train")
    assert input_bench.loader_throughput(source, num_threads=1, num_workers=0, batch=4, steps=3) > 0


def test_pillows_path_ends_in_a_view():
    view = input_bench.pillow_transform(Image.new("RGB", (500, 375), "white"), np.random.default_rng(0))
    assert view.shape == (224, 224, 3) and view.dtype == np.float32 and view.max() == 1
