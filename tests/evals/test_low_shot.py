"""Few labels: what is drawn depends on the seed alone, the budget of labels holds, and fits see no other label."""

import jax.random as jr
import numpy as np
import pytest

import jepax.evals.low_shot as module
from jepax.evals.logistic import select_layers
from jepax.evals.logistic_solver import fit_scaler, regularization_path
from jepax.evals.low_shot import LowShotConfig, draw_rows, low_shot
from jepax.evals.progress import Progress
from jepax.evals.scoring import topk
from jepax.types import UserError
from tests.evals.made import Made, clusters, run

KEY = jr.key(0)
SMALL = LowShotConfig(label_fractions=(0.05,), shots=(1, 3), num_draws=2, l2_penalties=(1.0, 1e-2))


def spied(monkeypatch, train, validation, config, classes=7):
    """The answers, and what every draw and every fit was given."""
    draws, fits = [], []

    def keep_draw(labels, counts, seed, stream):
        draws.append((stream, seed, counts, draw_rows(labels, counts, seed, stream)))
        return draws[-1][-1]

    def keep_fit(features, labels, *rest):
        fits.append((features, labels))
        return regularization_path(features, labels, *rest)

    monkeypatch.setattr(module, "draw_rows", keep_draw)
    monkeypatch.setattr(module, "regularization_path", keep_fit)
    return run(low_shot, train, validation, classes, config, key=KEY), draws, fits


def test_every_shot_and_seed_has_its_answer():
    train, validation, test = clusters()
    answers = run(low_shot, train, validation, 7, SMALL, key=KEY)
    assert [one.name for one in answers] == ["5%"] * 2 + ["1 per class"] * 2 + ["3 per class"] * 2
    assert [one.settings["seed"] for one in answers] == [0, 1] * 3
    for one in answers:
        assert one.predict(test.unlabeled()).shape == (301, 5)
        assert one.settings["validation_top1"] == max(tried["validation_top1"] for tried in one.trials)
        assert [tried["strength"] for tried in one.trials] == [1.0, 1e-2]
        assert one.variant == f"strength {one.settings['strength']:g}"
    assert [one.settings["labels"] for one in answers[2:]] == [7, 7, 21, 21]


def test_the_answer_is_the_fit_to_the_drawn_examples_chosen_on_the_drawn_validation():
    train, validation, test = clusters(layers=2, noise=3.0)
    config = LowShotConfig((), (5,), 3, (1.0, 1e-2, 1e-4))
    answers = run(low_shot, train, validation, 7, config, key=KEY)
    counts, standard = np.full(7, 5), fit_scaler(select_layers(train, "last"))
    for seed, answer in enumerate(answers):
        rows, held = draw_rows(train.labels, counts, seed, 0), draw_rows(validation.labels, counts, seed, 1)
        fits = list(
            regularization_path(
                select_layers(train, "last")[:, rows], train.labels[rows], 7, config.l2_penalties, standard
            )
        )
        guesses = [topk(model(select_layers(validation, "last")[:, held]))[:, 0] for _, model in fits]
        reached = [100 * np.mean(guess == validation.labels[held]) for guess in guesses]
        assert [tried["validation_top1"] for tried in answer.trials] == pytest.approx(reached)
        strength, model = fits[int(np.argmax(reached))]
        assert answer.settings["strength"] == strength
        np.testing.assert_array_equal(answer.predict(test.unlabeled()), topk(model(select_layers(test, "last"))))
    assert len({tuple(tried["validation_top1"] for tried in answer.trials) for answer in answers}) > 1


def test_the_budget_of_labels_holds(monkeypatch):
    train, validation, _ = clusters()
    answers, draws, fits = spied(monkeypatch, train, validation, SMALL)
    for answer, (rows, held), (_, labels) in zip(answers, zip(draws[::2], draws[1::2], strict=True), fits, strict=True):
        assert (rows[0], held[0]) == (0, 1) and rows[1] == held[1]
        assert len(labels) == len(rows[3]) == answer.settings["labels"]
        assert len(held[3]) == answer.settings["validation_labels"] <= len(rows[3])
        assert (np.bincount(validation.labels[held[3]], minlength=7) <= np.bincount(labels, minlength=7)).all()


def test_other_labels_change_nothing(monkeypatch):
    """Labels that no draw named may be anything of the same class sizes: here, two undrawn examples swap theirs."""
    train, validation, test = clusters()
    config = LowShotConfig((), (2,), 1, (1e-1, 1e-3))
    answers, draws, _ = spied(monkeypatch, train, validation, config)
    monkeypatch.undo()
    (_, _, _, rows), (_, _, _, held) = draws
    features = [split.features.layers.copy() for split in (train, validation)]
    for layers, used in zip(features, (rows, held), strict=True):
        rest = np.setdiff1d(np.arange(layers.shape[1]), used)
        layers[:, rest] = layers[:, rest[::-1]]  # other pictures, and with them other labels
    again = run(low_shot, Made(features[0], train.labels), Made(features[1], validation.labels), 7, config, key=KEY)
    assert again[0].trials[0]["validation_top1"] == answers[0].trials[0]["validation_top1"]
    assert np.mean(again[0].predict(test) == answers[0].predict(test)) > 0.99


@pytest.mark.parametrize("part", [0, 1])
def test_draws_are_stratified_nested_and_fixed_by_the_seed(part):
    labels = np.random.default_rng(0).integers(0, 5, 400).astype(np.int32)
    labels[:3] = 4
    few, many = (draw_rows(labels, np.array(counts), 3, part) for counts in ([1, 2, 0, 3, 1], [5, 5, 0, 5, 1]))
    assert np.bincount(labels[few], minlength=5).tolist() == [1, 2, 0, 3, 1]
    assert set(few) <= set(many) and (np.diff(many) > 0).all()
    np.testing.assert_array_equal(few, draw_rows(labels, np.array([1, 2, 0, 3, 1]), 3, part))
    others = [draw_rows(labels, np.full(5, 10), seed, side).tolist() for seed in (0, 1, 2) for side in (0, 1)]
    assert len({tuple(rows) for rows in others}) == 6
    everything = draw_rows(labels, np.full(5, 10**6), 0, part)
    np.testing.assert_array_equal(everything, np.arange(400))


def test_the_draw_is_the_recorded_one():
    labels = np.tile(np.arange(3, dtype=np.int32), 20)
    assert draw_rows(labels, np.full(3, 2), 0, 0).tolist() == [0, 8, 19, 26, 31, 51]


def test_every_example_is_drawn_about_as_often():
    labels = np.repeat(np.arange(2, dtype=np.int32), 50)
    drawn = np.concatenate([draw_rows(labels, np.array([10, 5]), seed, 0) for seed in range(400)])
    often = np.bincount(drawn, minlength=100)
    assert 50 < often[:50].min() and often[:50].max() < 110
    assert 18 < often[50:].min() and often[50:].max() < 65


def test_a_shot_is_of_every_class_that_has_examples():
    labels = np.repeat(np.arange(4), [1000, 149, 3, 0]).astype(np.int32)
    shots = dict(module.shot_counts(labels, 4, LowShotConfig((0.01, 0.125), ()), Progress(print)))
    assert {name: counts.tolist() for name, counts in shots.items()} == {
        "1%": [10, 1, 1, 0],
        "12.5%": [125, 19, 1, 0],
    }
    lines = []
    shots = dict(module.shot_counts(labels, 4, LowShotConfig((), (3, 4)), Progress(lines.append)))
    assert {name: counts.tolist() for name, counts in shots.items()} == {"3 per class": [3, 3, 3, 0]}
    assert len(lines) == 1


def test_a_shot_that_asks_too_much_is_left_out_and_said():
    lines = []
    train, validation, _ = clusters(sizes=(60, 30, 5), classes=3)
    smallest = np.bincount(train.labels).min()
    config = LowShotConfig((), (2, 50), 1, (1e-1,))
    answers = run(low_shot, train, validation, 3, config, key=KEY, progress=Progress(lines.append))
    assert [one.name for one in answers] == ["2 per class"]
    assert lines == [f"low-shot: 50 per class is left out, since the smallest class has {smallest} training examples"]
    with pytest.raises(UserError, match=rf"shots=\(50,\) are all more than the {smallest}"):
        run(low_shot, train, validation, 3, LowShotConfig((), (50,)), key=KEY)


def test_a_default_run_on_a_tiny_set_works():
    train, validation, test = clusters(sizes=(30, 12, 9), classes=3)
    answers = run(low_shot, train, validation, 3, LowShotConfig(num_draws=1, l2_penalties=(1e-1,)), key=KEY)
    assert {"1%", "10%", "1 per class", "5 per class"} <= {one.name for one in answers}
    assert all(one.predict(test).shape == (9, 3) for one in answers)


def test_a_class_without_training_examples_is_never_named():
    train, validation, test = clusters()
    kept = train.labels != 2
    train = Made(train.features.layers[:, kept], train.labels[kept])
    answers = run(low_shot, train, validation, 7, SMALL, key=KEY)
    assert all(2 not in one.predict(test) for one in answers)


def test_of_equals_the_strongest_penalty_is_chosen():
    train, validation, _ = clusters(noise=0.01)
    answers = run(low_shot, train, validation, 7, LowShotConfig((), (2,), 2, (1e-3, 1e-1)), key=KEY)
    assert [one.settings["strength"] for one in answers] == [1e-1, 1e-1]


def test_only_the_last_layer_is_read():
    train, validation, test = clusters(layers=2)
    changed = [Made(np.stack([0 * s.features.last, s.features.last]), s.labels) for s in (train, validation, test)]
    one, other = (run(low_shot, *splits[:2], 7, SMALL, key=KEY) for splits in ((train, validation), changed))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.predict(test), b.predict(changed[2]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_fractions": (0.0,)}, r"label_fractions=\(0.0,\)"),
        ({"label_fractions": (1.5,)}, r"label_fractions=\(1.5,\)"),
        ({"shots": (5, 0)}, r"shots=\(5, 0\)"),
        ({"label_fractions": (), "shots": ()}, "unless label_fractions has one"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"l2_penalties": (-1.0,)}, r"l2_penalties=\(-1.0,\)"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LowShotConfig(**settings)


def test_bad_labels_are_refused():
    train, validation, _ = clusters(sizes=(30, 20, 5))
    with pytest.raises(UserError, match="train split"):
        run(low_shot, train.unlabeled(), validation, 7, LowShotConfig(), key=KEY)
    with pytest.raises(UserError, match="validation split"):
        run(low_shot, train, validation.unlabeled(), 7, LowShotConfig(), key=KEY)
