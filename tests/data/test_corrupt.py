"""A corrupt image is replaced by another of its class, the same whatever reads it, and is reported."""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from jepax import cli
from jepax.data import CorruptLog, DataConfig, batches, iter_once, open_source
from jepax.data.decode import CorruptExampleError
from jepax.data.loader import epoch_permutation
from jepax.data.sources import MAX_REPLACEMENTS, ArraySource, Subset, synthetic
from jepax.evals.eval_dataset import EvalDataset, without_labels
from jepax.evals.feature_extractor import PixelFeatures
from jepax.evals.progress import SILENT, Progress
from jepax.io import config_yaml as configs
from jepax.types import UserError
from jepax.views import CropConfig

PER_CLASS = 12
BAD = (3, 4, 20)
"""Rows: two neighbors of the first class, one of the second."""
ROW = PixelFeatures(CropConfig(size=(4, 4), mean=(0.5,), std=(0.25,)), 2)


def gray(row):
    return 10 * row + 5


@pytest.fixture
def root(tmp_path):
    for row in range(2 * PER_CLASS):
        path = tmp_path / f"data/train/{'ab'[row // PER_CLASS]}/{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), gray(row)).save(path)
    return tmp_path / "data"


def opened(root, **settings):
    return open_source(
        DataConfig(dataset="image_folder", root=str(root), canvas_size=4, channels=1, val_fraction=0.0, **settings),
        "train",
    )


def spoil(source, rows, content=b"<html>not found</html>"):
    for row in rows:
        (source.folder / source.files[row]).write_bytes(content)


@pytest.fixture
def source(root):
    source = opened(root)
    spoil(source, BAD)
    return source


def shown(images):
    """Row of each picture, by its gray."""
    return ((images.canvas[:, 0, 0, 0].astype(int) - 5) // 10).tolist()


def test_the_next_of_the_class_stands_in_and_is_marked(source):
    images, replaced = source.load_batch(np.arange(24))
    expected = [{3: 5, 4: 5, 20: 21}.get(row, row) for row in range(24)]
    assert shown(images) == expected and images.index.tolist() == list(range(24))
    assert np.flatnonzero(replaced).tolist() == list(BAD)
    assert images.label.tolist() == source.labels.tolist() and (images.size == 4).all()


def test_the_last_of_a_class_gives_way_to_its_first(root):
    source = opened(root)
    spoil(source, [11, 23])
    images, _ = source.load_batch(np.array([11, 23]))
    assert shown(images) == [0, 12] and images.label.tolist() == [0, 1]


def test_candidates_are_of_the_class_and_few():
    def replacements(labels, row):
        images = np.zeros((len(labels), 2, 2, 1), np.uint8)
        return ArraySource((2, 2, 1), ("a", "b", "c"), np.asarray(labels, np.int32), images).replacements(row)

    assert replacements([0, 1, 0, 1, 1, 0], 1) == [3, 4]
    assert replacements([0, 1, 0, 1, 1, 0], 4) == [1, 3]
    assert replacements(np.zeros(50), 49) == list(range(MAX_REPLACEMENTS))
    assert replacements(np.arange(3), 1) == []


def test_loading_without_replacement_stays_strict(source):
    with pytest.raises(CorruptExampleError, match=r"a/03\.png cannot be read"):
        source.load(3)


def test_each_picture_is_decoded_once(source, monkeypatch):
    reads, real = [], type(source).load
    monkeypatch.setattr(type(source), "load", lambda self, row: reads.append(row) or real(self, row))
    source.load_batch(np.arange(6))
    assert reads == [0, 1, 2, 3, 4, 5, 4, 5, 5]


def test_where_nothing_nearby_can_be_read_it_ends_at_once_and_names_the_files(root, monkeypatch):
    source = opened(root)
    spoil(source, range(24))
    reads, real = [], type(source).load
    monkeypatch.setattr(type(source), "load", lambda self, row: reads.append(row) or real(self, row))
    with pytest.raises(CorruptExampleError) as caught:
        source.load_batch(np.arange(24))
    text = str(caught.value)
    assert len(reads) == 1 + MAX_REPLACEMENTS
    assert all(f"a/{row:02}.png" in text for row in range(9))
    assert len(text.splitlines()) <= 5


def test_the_only_picture_of_a_class_is_named(root):
    for row in range(13, 24):
        (root / f"train/b/{row}.png").unlink()
    source = opened(root)
    spoil(source, [12])
    with pytest.raises(CorruptExampleError, match=r"b/12\.png cannot be read(.|\n)*no other of its kind"):
        next(iter_once(source, 13))


def digest_and_rows(source, **reading):
    digest, told = hashlib.sha256(), []
    for images in batches(
        source, batch_size=7, steps=9, seed=3, on_corrupt=lambda rows: told.append(rows.tolist()), **reading
    ):
        for part in (images.canvas, images.size, images.label, images.index):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest(), told


def test_threads_and_workers_change_neither_batches_nor_what_is_told(source):
    expected = digest_and_rows(source, num_threads=0)
    assert sorted({row for rows in expected[1] for row in rows}) == list(BAD)
    for reading in ({"num_threads": 1}, {"num_threads": 3}, {"num_threads": 1, "num_workers": 2}):
        assert digest_and_rows(source, **reading) == expected


def test_rows_are_told_before_their_batch_and_labels_stay_right(source):
    told = []
    stream = batches(
        source, batch_size=8, steps=6, seed=0, num_threads=3, on_corrupt=lambda rows: told.extend(rows.tolist())
    )
    for images in stream:
        epochs, places = np.divmod(images.index, 24)
        rows = [int(epoch_permutation(24, 0, int(epoch))[place]) for epoch, place in zip(epochs, places, strict=True)]
        assert told == [row for row in rows if row in BAD]
        assert shown(images) == [{3: 5, 4: 5, 20: 21}.get(row, row) for row in rows]
        assert images.label.tolist() == source.labels[rows].tolist()
        told.clear()


def test_each_process_is_told_of_its_own_share(source):
    def told(**share):
        found = []
        for _ in batches(source, batch_size=8, steps=6, seed=0, on_corrupt=lambda rows: found.extend(rows), **share):
            pass
        return found

    shares = [told(process_index=index, process_count=2) for index in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(told()) == sorted(2 * BAD) and all(shares)  # two epochs


def test_a_sweep_tells_each_row_once_padding_left_out(root):
    source = opened(root)
    spoil(source, [0, 23])
    told = []
    swept = list(iter_once(source, 10, on_corrupt=lambda rows: told.append(rows.tolist())))
    assert told == [[0], [23]]
    assert [row for images, valid in swept for row in shown(images)[:valid]] == [1, *range(1, 23), 12]


def test_left_out_the_first_is_warned_of_once(source):
    for stream in (batches(source, batch_size=8, steps=6, seed=0), iter_once(source, 8)):
        with pytest.warns(UserWarning, match=r"\.png cannot be read and is replaced") as warned:
            list(stream)
        assert len(warned) == 1


def test_what_the_callback_raises_ends_the_reading(source):
    def stop(rows):
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        list(batches(source, batch_size=8, steps=3, seed=0, on_corrupt=stop))


def test_views_of_a_source_replace_too(source):
    part = Subset(source.canvas_shape, source.class_names, source.labels[[3, 20]], source, np.array([3, 20]))
    kept_back = without_labels(part)
    for view, labels in ((part, [0, 1]), (kept_back, [-1, -1])):
        images, replaced = view.load_batch(np.arange(2))
        assert shown(images) == [5, 21] and replaced.all() and images.label.tolist() == labels
        assert view.display_name(1).endswith("b/20.png") and view.fingerprint == source.fingerprint


@pytest.mark.parametrize("spoken", [True, False])
def test_evaluation_says_how_many_were_replaced(source, spoken):
    lines = []
    split = EvalDataset(ROW, source, 8, name="features of test", progress=Progress(lines.append) if spoken else SILENT)
    with contextlib.nullcontext() if spoken else pytest.warns(UserWarning) as warned:
        list(split.images())
        list(split.images())
        list(split.shuffled(8, 3, 0))
    (line,) = lines if spoken else [str(each.message) for each in warned]
    assert line.startswith("features of test: 3 of 24 images are unreadable") and "a/03.png" in line
    assert split.corrupt_rows == set(BAD)


# The list of a run


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_file_is_listed_once_with_its_reason(source, tmp_path):
    path, lines = tmp_path / "run/corrupt.jsonl", []
    (source.folder / source.files[20]).unlink()
    broken = CorruptLog(source, path, 0.5, lines.append)
    list(batches(source, batch_size=8, steps=9, seed=0, on_corrupt=broken))
    found = {entry["file"]: entry["why"] for entry in listed(path)}
    assert sorted(found) == [source.display_name(row) for row in BAD] and len(listed(path)) == len(lines) == 3
    assert "none of JPEG, PNG" in found[source.display_name(3)] and "No such file" in found[source.display_name(20)]
    assert "0x" not in path.read_text()


def test_a_later_part_of_the_run_does_not_list_again_and_mends_a_torn_line(source, tmp_path):
    path = tmp_path / "corrupt.jsonl"
    CorruptLog(source, path, 0.5, print)(np.array([3, 4]))
    whole = path.read_text()
    path.write_text(whole[:-9])
    again = CorruptLog(source, path, 0.5, print)
    assert path.read_text() == whole.splitlines(keepends=True)[0] and len(again.why) == 1
    again(np.array([3, 4, 20]))
    assert [entry["file"] for entry in listed(path)] == [source.display_name(row) for row in BAD]
    path.write_text(path.read_text()[:-1])  # whole but for its end: the next line must not run into it
    CorruptLog(source, path, 0.5, print)(np.array([5]))
    assert len(listed(path)) == 4


def test_a_data_set_that_moved_does_not_count_again(source, tmp_path):
    path, moved = tmp_path / "corrupt.jsonl", tmp_path / "elsewhere/train"
    CorruptLog(source, path, 0.5, print)(np.array([3, 4]))
    shutil.copytree(source.folder, moved)
    CorruptLog(dataclasses.replace(source, folder=moved), path, 0.5, print)(np.array([3, 4]))
    assert [entry["file"] for entry in listed(path)] == [source.display_name(row) for row in (3, 4)]
    assert source.display_name(3).startswith("train/")


def test_too_many_end_the_run_and_name_setting_count_and_list(source, tmp_path):
    path = tmp_path / "corrupt.jsonl"
    broken = CorruptLog(source, path, 2 / 24, print)
    broken(np.array([3, 4, 3, 4]))  # two are allowed, however often they are met
    with pytest.raises(UserError, match=r"data\.max_corrupt_fraction=0\.083.* of 24 examples .* but 3 are") as caught:
        broken(np.array([20]))
    text = str(caught.value)
    assert str(path) in text and source.display_name(20) in text and len(text.splitlines()) <= 5
    assert len(listed(path)) == 3  # the last one too
    with pytest.raises(UserError, match="but 3 are"):  # nor does resuming get past it
        CorruptLog(source, path, 2 / 24, print)(np.array([3]))


def test_what_an_error_advises_is_enough(source, tmp_path, capsys):
    """The files are all named by one command; repaired or removed, and the list deleted, reading goes on."""
    path = tmp_path / "corrupt.jsonl"
    with pytest.raises(UserError, match=rf"`jepax doctor DATA_ROOT`(.|\n)*and delete {path}"):
        CorruptLog(source, path, 2 / 24, print)(np.array(BAD))
    with pytest.raises(SystemExit):
        cli.main(["doctor", str(source.folder.parent)])
    out = capsys.readouterr().out
    assert [source.display_name(row) for row in BAD] == re.findall(r"(\S+) cannot be read: its content is none of", out)
    assert out.endswith("3 of 24 images cannot be read\n")
    (source.folder / source.files[BAD[0]]).unlink()
    for row in BAD[1:]:
        Image.new("L", (4, 4), gray(row)).save(source.folder / source.files[row])
    path.unlink()
    again = opened(source.folder.parent)
    CorruptLog(again, path, 0.0, print)
    assert not again.load_batch(np.arange(23))[1].any()
    cli.main(["doctor", str(source.folder.parent)])
    assert capsys.readouterr().out.endswith("all 23 images can be read\n")


def test_what_every_process_has_listed_counts(source, tmp_path):
    """A run goes on with another number of processes; each writes its own list, and mends no other."""
    mine, other = tmp_path / "corrupt.jsonl", tmp_path / "corrupt_1.jsonl"
    CorruptLog(source, tmp_path / "elsewhere/corrupt.jsonl", 0.5, print)(np.array([3, 4]))
    (tmp_path / "elsewhere/corrupt.jsonl").rename(other)
    known = [entry["file"] for entry in listed(other)]
    other.write_text(torn := other.read_text() + '{"fi')
    again = CorruptLog(source, mine, 2 / 24, print)
    assert list(again.why) == known
    again(np.array([3, 4]))
    with pytest.raises(UserError, match=r"but 3 are; all are listed in .*/corrupt\*\.jsonl"):
        again(np.array([20]))
    assert other.read_text() == torn and len(listed(mine)) == 1


def test_without_a_path_nothing_is_written_and_the_rest_holds(source, tmp_path):
    before = set(tmp_path.rglob("*"))
    broken = CorruptLog(source, None, 0.0)
    with (
        pytest.warns(UserWarning, match=r"a/03\.png"),
        pytest.raises(UserError, match=r"data\.max_corrupt_fraction=0\.0 of"),
    ):
        broken(np.array([3]))
    assert set(tmp_path.rglob("*")) == before


def test_a_file_that_is_whole_again_is_listed_as_such(source, tmp_path):
    path = tmp_path / "corrupt.jsonl"
    CorruptLog(source, path, 0.5, print)(np.array([0]))
    assert listed(path)[0]["why"] == "could be read when it was tried again"


def test_of_very_many_files_only_some_are_spoken_of():
    source = synthetic.open_split("train", images=300, canvas_shape=(4, 4, 1))
    lines = []
    broken = CorruptLog(source, None, 1.0, lines.append)
    broken(np.arange(250))
    assert len(lines) == 12 and len(broken.why) == 250 and "row 0 cannot be read" in lines[0]


def test_arrays_are_described_by_number_shape_and_digests():
    pictures = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2, 1)

    def contents(pictures, labels):
        return ArraySource((2, 2, 1), ("a", "b"), np.array(labels, np.int32), pictures).fingerprint

    before = contents(pictures, [0, 1, 0])
    assert before["images"].startswith("3 of 2 x 2 x 1, ") and before["labels"].startswith("2 classes, ")
    assert contents(np.asfortranarray(pictures), [0, 1, 0]) == before
    (line,) = configs.diff(before, contents(pictures, [0, 1, 1]))
    assert line.startswith("labels: ")
    (line,) = configs.diff(before, contents(pictures + np.uint8(1), [0, 1, 0]))
    assert line.startswith("images: ")
