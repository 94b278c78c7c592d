"""Curves show what was logged: no more, no less, and what was not finite."""

import numpy as np
import pytest

from jepax.health.alerts import Alert
from jepax.viz.curves import PANELS, Series, plot_curves, running_median


def log(steps: int, **changed: object) -> list[dict]:
    """Lines of a run of four encoder blocks."""
    fixed = {
        "ema/momentum": 0.996,
        "optim/weight_decay": 0.04,
        "health/embedding/rankme": 20.0,
        "health/embedding/std": 0.5,
    }
    fixed |= {"perf/images_per_sec": 9.0, "perf/tflops": 400.0, "perf/mfu": 0.4, "perf/mfu_measured": 0.5}
    fixed |= {"health/nonzero_fraction": 0.4, "health/nonzero_fraction_expected": 0.5}
    fixed |= {
        "health/embedding/alpha_req": 2.0,
        "health/embedding/mean_cosine": 0.5,
        "health/embedding/dead_fraction": 0.1,
        "ema/relative_distance": 0.2,
    }
    fixed |= {
        "val/probe_top1": 80.0,
        "val/knn_top1": 75.0,
        "train/explained_variance": 0.4,
        "health/target_norm": 14.0,
        "health/prediction_norm": 10.0,
    }
    for rows in ("health/embedding", "health/projection"):
        fixed[f"{rows}/std_quantiles"] = [0.1, 0.2, 0.3, 0.4, 0.5]
    falling = ("train/loss", "train/loss_max", "optim/grad_norm", "optim/grad_norm_max", "grad_norm/predictor")
    falling += ("optim/update_norm", "ema/update_norm", "ema/expected_update_norm", "optim/lr")
    return [
        {
            "step": 10 * i,
            **fixed,
            **{name: 1 / (1 + i) for name in falling},
            "grad_norm/encoder_blocks": [0.1, 0.2, 0.3, 0.4],
            **changed,
        }
        for i in range(steps)
    ]


def panels(figure) -> dict:
    return {axes.get_ylabel(): axes for axes in figure.axes if axes.axison}


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_every_metric_has_its_panel_and_norms_that_fall_far_a_log_scale():
    drawn = panels(plot_curves(log(60), "mine"))
    assert list(drawn) == [panel.title for panel in PANELS]
    assert drawn["loss"].get_yscale() == drawn["gradient norm (L2)"].get_yscale() == "log"
    assert drawn["momentum"].get_yscale() == drawn["learning rate"].get_yscale() == "linear"
    assert drawn["effective rank (dimensions)"].get_ylim()[0] == 0
    of_gradient = labels(drawn["gradient norm (L2)"])
    assert of_gradient == ["encoder block 1", "encoder block 4", "highest of a step", "all parameters"]
    assert labels(drawn["deviation of embeddings' features"]) == ["least", "greatest", "mean"]


def test_scores_of_few_lines_are_points_as_they_were_logged():
    lines = [line if line["step"] % 100 == 0 else line | {"val/probe_top1": None} for line in log(200)]
    lines = [{name: value for name, value in line.items() if value is not None} for line in lines]
    for place, line in enumerate(line for line in lines if "val/probe_top1" in line):
        line["val/probe_top1"] = float(place % 2)
    drawn = panels(plot_curves(lines, "mine"))["validation top-1 during training (%)"]
    probe = next(line for line in drawn.lines if line.get_label() == "linear probe")
    np.testing.assert_array_equal(probe.get_xdata(), np.arange(0, 2000, 100))
    np.testing.assert_array_equal(probe.get_ydata(), np.arange(20) % 2)


def test_alarms_are_lines_in_every_panel_and_named_once():
    said = [Alert("spike", 120, {}, ""), Alert("collapse", 130, {}, "")]
    drawn = panels(plot_curves(log(60), "mine", said))
    for axes in drawn.values():
        upright = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert upright == [120, 130]
    assert [text.get_text() for text in drawn["loss"].texts] == ["spike", "collapse"]
    assert not any(axes.texts for name, axes in drawn.items() if name != "loss")


def test_one_value_far_below_does_not_hide_the_others():
    lines = log(60)
    lines[0]["train/explained_variance"] = -3000.0
    assert panels(plot_curves(lines, "mine"))["share of loss explained"].get_ylim()[0] == -1


def test_values_that_are_all_far_below_are_shown():
    lines = log(60, **{"train/explained_variance": -5.0})
    low, high = panels(plot_curves(lines, "mine"))["share of loss explained"].get_ylim()
    assert low < -5 < high


def test_a_metric_that_no_panel_holds_gets_its_own():
    lines = log(60, **{"train/sigreg_loss": 3.0, "perf/step_time": 0.1})
    drawn = panels(plot_curves(lines, "mine"))
    assert list(drawn)[len(PANELS) :] == ["train/sigreg loss"]
    assert drawn["train/sigreg loss"].lines[0].get_ydata()[0] == 3.0


def test_what_a_method_does_not_log_is_left_out():
    lines = log(60)
    for line in lines:
        del line["ema/momentum"], line["ema/update_norm"], line["ema/expected_update_norm"], line["grad_norm/predictor"]
    drawn = panels(plot_curves(lines, "mine"))
    assert "momentum" not in drawn
    assert drawn["change per step (L2 norm)"].get_legend() is None
    assert "gradient norm, predictor (L2)" not in drawn


def test_values_that_were_not_finite_are_marked_at_their_steps():
    lines = log(60)
    lines[7]["optim/grad_norm"] = None
    lines[9]["grad_norm/encoder_blocks"] = [0.1, None, 0.3, 0.4]
    axes = panels(plot_curves(lines, "mine"))["gradient norm (L2)"]
    marks = next(line for line in axes.lines if line.get_label() == "not finite")
    assert list(marks.get_xdata()) == [70, 90]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_has_just_begun_can_be_drawn(steps):
    lines = log(steps, **{"train/loss": None, "optim/lr": 0.0})
    figure = plot_curves(lines, "mine")
    figure.canvas.draw()
    assert len(panels(figure)) == len(PANELS)


def test_the_running_median_keeps_ends_gaps_and_a_steep_start():
    values = np.array([9.0, 5.0, 3.0, 3.0, 90.0, 3.0, np.nan, 3.0, 2.0])
    smooth = running_median(values, 2)
    assert smooth[0] == 9 and smooth[4] == 3
    assert np.flatnonzero(np.isnan(smooth)).tolist() == [6]
    np.testing.assert_array_equal(running_median(values, 0), values)
    assert np.isnan(running_median(np.full(3, np.nan), 1)).all()


def test_a_series_knows_its_layers_and_its_losses():
    by_block = Series([{"step": 0, "x": [1.0, None]}, {"step": 5, "x": [1.0, 2.0]}, {"step": 6}], "x")
    assert by_block.by_layer and by_block.values.shape == (2, 2)
    assert by_block.lost.tolist() == [0]
    assert Series([{"step": 0, "x": 0.0}], "x").is_zero and not Series([{"step": 0, "x": None}], "x").is_zero
