"""`jepax bench-data RECIPE`: images read per second and core, against Pillow and the step's need."""

import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepax.bench.machine import describe_machine
from jepax.bench.step_bench import StepBenchmark
from jepax.bench.timing import interleave
from jepax.data import CLIP_DATASETS, batches, open_source, pack
from jepax.data.decode import read_image
from jepax.distributed.multihost import cores
from jepax.training.config import Config
from jepax.training.dry_run import LogFn, make_dry_setup
from jepax.types import UserError

NUM_PHOTOS, PHOTO_SIZE, JPEG_QUALITY = 256, (375, 500), 90
"""Number of generated photos, their height and width (typical of ImageNet), and JPEG quality."""
VIEW_SIZE = 224
"""Side in pixels of the view that Pillow's path produces."""


def measure_input(config: Config, rounds: int, print: LogFn = print) -> dict[str, Any]:
    """Measure images per second on the recipe's folder, or on generated photos if it has none.

    Raises `UserError` for a recipe of clips, which reads no photos.
    """
    if config.data.dataset in CLIP_DATASETS:
        raise UserError(
            f"bench-data reads photos, and data.dataset={config.data.dataset} has clips; jepax bench times their step"
        )
    machine = describe_machine()
    has_photos = config.data.dataset == "image_folder" and config.data.root is not None
    photos_name = "its photos" if has_photos else f"generated photos of {PHOTO_SIZE[0]} x {PHOTO_SIZE[1]}"
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        if has_photos:
            link_photos(config, photos)
        else:
            generate_photos(photos)
        data = replace(config.data, dataset="image_folder", root=str(photos), val_fraction=0.0)
        source = open_source(data, "train")
        files = [source.folder / file for file in source.files]
        print(f"{len(files)} photos, one core ...")
        one_core = time_one_core(files, data.canvas_size, rounds)
        print("through the loader ...")
        loaded = {}
        for threads, workers in ((1, 0), (cores(), 0), (1, cores())):
            loaded[f"{threads} threads, {workers} workers"] = loader_throughput(source, threads, workers)
        pack.pack(photos, Path(folder) / "pack", pack.PackConfig(canvas_size=data.canvas_size), lambda _: None)
        packed = open_source(replace(data, dataset="packed", root=f"{folder}/pack"), "train")
        loaded["1 threads, 0 workers, packed"] = loader_throughput(packed, 1, 0)
    print("the step ...")
    steps = StepBenchmark(make_dry_setup(config, print)).steps(rounds)
    return {
        "what": f"{config.recipe}: reading {photos_name}",
        "machine": machine,
        "files": len(files),
        "one_core_images_per_s": one_core,
        "over_pillow": one_core["ours"] / one_core["pillow"],
        "loader_images_per_s": loaded,
        "loader_over_pillow": loaded["1 threads, 0 workers"] / one_core["pillow"],
        "step_images_per_s": steps["images_per_s"],
    }


def input_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each row of the table."""
    one_core = found["one_core_images_per_s"]
    return [
        ("one core: ours, onto the canvas", f"{one_core['ours']:,.0f} images/s"),
        ("one core: Pillow, cropped and resized", f"{one_core['pillow']:,.0f} images/s"),
        ("ours over Pillow's", f"{found['over_pillow']:.2f}"),
        ("one loader thread over Pillow's", f"{found['loader_over_pillow']:.2f}"),
        *((f"loader: {name}", f"{value:,.0f} images/s") for name, value in found["loader_images_per_s"].items()),
        ("the step takes", f"{found['step_images_per_s']:,.1f} images/s"),
    ]


def link_photos(config: Config, folder: Path) -> None:
    """Fill a folder with links to a few of the recipe's photos, evenly over its classes."""
    for part, split, count in (("train", "train", NUM_PHOTOS), ("val", "test", 2)):
        source = open_source(replace(config.data, val_fraction=0.0), split)
        (folder / part / "photo").mkdir(parents=True)
        for number, row in enumerate(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)):
            file = source.folder / source.files[row]
            (folder / part / "photo" / f"{number:04d}{file.suffix}").symlink_to(file.absolute())


def generate_photos(folder: Path) -> None:
    """Fill a folder with JPEGs that have the detail of photos: smooth shapes and some noise."""
    random = np.random.default_rng(0)
    for split, count in (("train", NUM_PHOTOS), ("val", 2)):
        (folder / split / "photo").mkdir(parents=True)
        for number in range(count):
            small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
            smooth = np.asarray(small.resize(PHOTO_SIZE[::-1], Image.Resampling.BICUBIC), np.int16)
            noisy = np.clip(smooth + random.normal(0, 8, (*PHOTO_SIZE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / split / "photo" / f"{number:04d}.jpg", quality=JPEG_QUALITY)


def time_one_core(files: list[Path], canvas: int, rounds: int) -> dict[str, float]:
    """Images per second of one thread: ours decodes onto the canvas; Pillow decodes, crops and resizes."""
    random = np.random.default_rng(0)

    def ours() -> None:
        for file in files:
            image = read_image(file, (canvas, canvas, 3))
            np.zeros((canvas, canvas, 3), np.uint8)[: image.shape[0], : image.shape[1]] = image

    def pillow() -> None:
        for file in files:
            with Image.open(file) as image:
                pillow_transform(image.convert("RGB"), random)

    times = interleave({"ours": ours, "pillow": pillow}, rounds)
    return {name: len(files) / float(np.median(taken)) for name, taken in times.items()}


def pillow_transform(image: Image.Image, random: np.random.Generator) -> np.ndarray:
    """Random resized crop as a float array, as image loaders compute it on the host."""
    scale, ratio = random.uniform(0.3, 1.0), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
    area = scale * image.width * image.height
    width, height = min(round((area * ratio) ** 0.5), image.width), min(round((area / ratio) ** 0.5), image.height)
    left, top = random.integers(0, image.width - width + 1), random.integers(0, image.height - height + 1)
    view = image.resize((VIEW_SIZE, VIEW_SIZE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return np.asarray(view, np.float32) / 255


def loader_throughput(source: Any, num_threads: int, num_workers: int, batch: int = 32, steps: int = 40) -> float:
    """Images per second of the loader, after its start."""
    warmup = 4
    options = {"num_threads": num_threads, "num_workers": num_workers}
    with closing(batches(source, batch_size=batch, steps=steps + warmup, seed=0, **options)) as reading:
        for _ in range(warmup):
            next(reading)
        start = time.perf_counter()
        for _ in reading:
            pass
        return steps * batch / (time.perf_counter() - start)
