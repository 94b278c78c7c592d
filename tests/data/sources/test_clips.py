"""A clip's actions lead from each of its frames to the next one, and splits share no episode."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.commands.train import reason_not_to_evaluate
from jepax.data import ClipSource, DataConfig, Source, batches, iter_once, open_source
from jepax.data.episodes import Episodes, write_episodes
from jepax.data.simulate import POLICIES, make_environment, render, simulate
from jepax.data.sources import clips
from jepax.envs import TwoRoom
from jepax.training.config import Config, can_evaluate_online, check_eval_splits, validate
from jepax.training.evaluation import EvalTarget, evaluate
from jepax.types import ClipBatch, UserError

ENV = TwoRoom(image_size=32)
SIMULATED = DataConfig(dataset="two_room", canvas_size=32, num_episodes=24, val_fraction=0.25)


def open_(split="train", **changes) -> ClipSource:
    return open_source(DataConfig(**{**vars(SIMULATED), **changes}), split)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 24 episodes; two of them have no action but one."""
    pool = simulate(ENV, POLICIES["random"], 24, 5, max_steps=30)
    lengths = np.where(np.arange(24) % 12 == 3, 2, pool.lengths)
    rows = np.concatenate([start + np.arange(n) for start, n in zip(pool.starts, lengths, strict=True)])
    actions = pool.actions[rows]
    actions[np.cumsum(lengths) - 1] = 0
    path = tmp_path_factory.mktemp("data") / "episodes"
    written = Episodes(actions, pool.states[rows], lengths, render(ENV, pool.states[rows]))
    write_episodes(path, {"environment": "two_room"}, 1, lambda _: written)
    return path


@pytest.fixture(scope="module", params=["two_room", "episodes"])
def source(request, folder):
    return open_() if request.param == "two_room" else open_(dataset="episodes", root=str(folder))


def test_the_actions_of_a_clip_lead_from_each_frame_to_the_next(source):
    """Simulated again, from the state of the clip's first frame, with its actions alone."""
    rows = np.linspace(0, len(source) - 1, 32).astype(int)
    batch, replaced = source.load_batch(rows)
    assert batch.frames.shape == (32, 4, 32, 32, 3) and batch.frames.dtype == np.uint8
    assert batch.actions.shape == (32, 4, 10) and batch.actions.dtype == np.float32 and not replaced.any()
    actions = batch.actions.reshape(32, 20, 2) * source.action_std + source.action_mean

    def replay(state, actions):
        def step(state, action):
            after = ENV.step(state, action, jr.key(0))
            return after, state

        return jax.lax.scan(step, state, actions)

    first = source.first_rows[rows]
    last, states = jax.vmap(replay)(jnp.asarray(source.episodes.states[first]), jnp.asarray(actions))
    np.testing.assert_allclose(states, source.episodes.states[first[:, None] + np.arange(20)], atol=1e-3)
    np.testing.assert_allclose(last, source.episodes.states[first + 20], atol=1e-3)  # the fourth block leads on
    frames = np.stack([render(ENV, np.asarray(clip)) for clip in states[:, ::5]])
    assert np.abs(frames.astype(int) - batch.frames).max() <= 1


def test_every_clip_is_within_an_episode_and_none_is_left_out(source):
    """A clip of 4 frames, 5 steps apart, has 20 actions, which all exist."""
    expected = []
    for member in source.members:
        start, actions = source.episodes.starts[member], source.episodes.lengths[member] - 1
        expected += [start + first for first in range(actions) if first + 20 <= actions]
    assert source.first_rows.tolist() == expected and len(source) == len(expected) > 32


def test_other_lengths_of_clips(folder):
    source = open_(dataset="episodes", root=str(folder), clip_frames=2, frame_skip=1)
    batch, _ = source.load_batch(np.array([0, 7]), np.array([3, 4], np.int32))
    assert batch.frames.shape == (2, 2, 32, 32, 3) and batch.actions.shape == (2, 2, 2)
    assert batch.index.tolist() == [3, 4] and batch.index.dtype == np.int32
    np.testing.assert_array_equal(batch.frames[0], source.episodes.frames[source.first_rows[0] + np.arange(2)])


def test_actions_are_standardized_by_the_training_episodes(folder):
    train, validation = (open_(split, dataset="episodes", root=str(folder)) for split in ("train", "validation"))
    actions = []
    for member in train.members:
        start, length = train.episodes.starts[member], train.episodes.lengths[member]
        actions += [train.episodes.actions[start : start + length - 1]]
    actions = np.concatenate(actions).astype(np.float64)
    for source in (train, validation):
        np.testing.assert_allclose(source.action_mean, actions.mean(0), rtol=1e-5)
        np.testing.assert_allclose(source.action_std, actions.std(0), rtol=1e-5)
    z = (actions - train.action_mean) / train.action_std
    np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=1e-5)


def test_an_action_that_never_changes_is_zero():
    steps = 30
    states, actions = np.zeros((steps, 2), np.float32), np.full((steps, 2), 0.5, np.float32)
    one = Episodes(actions, states, np.array([steps]), np.zeros((steps, 2, 2, 3), np.uint8))
    mean, std = clips.action_statistics(one, np.array([0]))
    source = ClipSource(one, np.array([0]), 4, 5, mean, std, {})
    assert not source.load_batch(np.arange(len(source)))[0].actions.any()


def test_splits_are_of_whole_episodes(folder):
    train, validation = (open_(split, dataset="episodes", root=str(folder)) for split in ("train", "validation"))
    assert sorted([*train.members, *validation.members]) == list(range(24)) and len(validation.members) == 6
    again = open_("validation", dataset="episodes", root=str(folder), synthetic_seed=7)
    assert again.members.tolist() == validation.members.tolist()


def test_simulated_splits_share_no_episode_and_follow_from_the_seed():
    sources = [open_(split) for split in ("train", "validation", "test")]
    assert [len(source.members) for source in sources] == [18, 6, 4]
    starts = [tuple(state) for s in sources for state in s.episodes.states[s.episodes.starts]]
    assert len(set(starts)) == 28
    for source in sources[1:]:
        np.testing.assert_array_equal(source.action_mean, sources[0].action_mean)
    np.testing.assert_array_equal(open_().episodes.states, sources[0].episodes.states)
    assert not np.array_equal(open_(synthetic_seed=1).episodes.states[:9], sources[0].episodes.states[:9])
    prints = [source.fingerprint for source in (*sources, open_(synthetic_seed=1))]
    assert prints[0] == prints[1] and len({str(each) for each in prints}) == 3


def test_more_episodes_begin_with_the_same_ones():
    few, many = (simulate(ENV, POLICIES["expert"], count, 0) for count in (3, 300))
    np.testing.assert_array_equal(few.lengths, many.lengths[:3])
    np.testing.assert_array_equal(few.states, many.states[: len(few.states)])
    assert len(many) == 300 and many.lengths.min() >= 2 and many.lengths.max() == 101
    assert not many.actions[many.starts + many.lengths - 1].any()


def test_the_loader_reads_the_same_from_one_at_a_time(source):
    rows = np.array([5, 0, 31])
    batch, _ = source.load_batch(rows)
    other, _ = Source.load_batch(source, rows)
    jax.tree.map(np.testing.assert_array_equal, batch, other)
    assert type(other) is ClipBatch
    swept = [batch.index[:valid] for batch, valid in iter_once(source, 50)]
    assert np.concatenate(swept).tolist() == list(range(len(source)))


@pytest.mark.parametrize("dataset", ["episodes", pytest.param("two_room", marks=pytest.mark.long)])
def test_the_same_batches_from_threads_and_workers(dataset, folder):
    source = open_(dataset=dataset, root=str(folder))

    def arrays(**how):
        return [batch.actions.copy() for batch in batches(source, batch_size=6, steps=3, seed=0, **how)]

    alone = arrays(num_threads=0)
    for how in ({"num_threads": 4}, {"num_threads": 1, "num_workers": 2}):
        assert all(np.array_equal(one, other) for one, other in zip(alone, arrays(**how), strict=True))


def test_it_is_described(source, folder):
    said = source.describe()
    assert said.startswith(f"{len(source):,} clips of 4 frames, 5 steps apart, from 18 episodes; ")
    assert source.display_name(0) == f"episode {source.members[source.clips_per_member > 0][0]}, step 0"
    whole = open_(dataset="episodes", root=str(folder), clip_frames=1, frame_skip=1)
    assert whole.describe().endswith(" from 18 episodes")


def test_another_folder_has_another_fingerprint(source, folder, tmp_path):
    held_out = open_("validation", dataset="episodes", root=str(folder))
    mine = open_(dataset="episodes", root=str(folder)).fingerprint
    assert mine == held_out.fingerprint and list(mine) == ["frames", "actions", "states", "lengths"]


CHANGES = {
    "root": ({"dataset": "episodes"}, r"data\.root=None, .* needs the folder that holds episodes\.json"),
    "nothing": ({"dataset": "episodes", "root": "/nowhere"}, r"/nowhere is no complete folder of episodes"),
    "size": ({"canvas_size": 512}, r"data\.canvas_size=512 does not fit data\.dataset=two_room: image_size=512"),
    "memory": ({"canvas_size": 224}, r"(?s)need 5 GB .* collect two_room --num-episodes 700 --image-size 224 --out"),
    "length": ({"frame_skip": 40}, r"data\.clip_frames=4 x data\.frame_skip=40 is longer than the 100 actions"),
    "fraction": ({"val_fraction": 0.99}, r"data\.val_fraction=0\.99 leaves no episode for the train split out of 24"),
}


@pytest.mark.parametrize(("changes", "said"), CHANGES.values(), ids=CHANGES)
def test_what_does_not_fit_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        open_(**{**changes, **({"num_episodes": 700} if "canvas_size" in changes else {})})


def test_a_folder_has_no_test_split_and_its_actions_are_finite(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has no test split"):
        open_("test", dataset="episodes", root=str(folder))
    rows = np.zeros((9, 2), np.float32)
    one = Episodes(np.full_like(rows, np.nan), rows, np.array([9]), np.zeros((9, 2, 2, 3), np.uint8))
    write_episodes(tmp_path / "bad", {}, 1, lambda _: one)
    with pytest.raises(UserError, match="actions are not all finite"):
        open_(dataset="episodes", root=str(tmp_path / "bad"), val_fraction=0.0)


def test_methods_and_protocols_on_images_do_not_read_clips(tmp_path):
    config = Config(data=SIMULATED)
    with pytest.raises(UserError, match=r"method ijepa reads images, but the data has [\d,]+ clips"):
        validate(config, open_())
    assert not can_evaluate_online(config, open_())
    assert reason_not_to_evaluate(config, 0, tmp_path).startswith("data.dataset=two_room has no labels")
    check_eval_splits(DataConfig(dataset="episodes", root="/nowhere"))  # there is nothing to evaluate
    target = object.__new__(EvalTarget)  # without an encoder
    object.__setattr__(target, "config", config)
    with pytest.raises(UserError, match=r"data\.dataset=two_room has no labels"):
        evaluate(target)


def test_channels_are_for_images():
    with pytest.raises(UserError, match=r"data\.channels=1 is for images; two_room has its own: set None"):
        DataConfig(dataset="two_room", channels=1)


def test_environments_that_draw_one_size_refuse_others():
    make = partial(make_environment, "two_room_pldm")
    assert make().image_size == make(65).image_size == 65
    with pytest.raises(UserError, match="image_size=32: two_room_pldm draws images of 65 pixels"):
        make(32)
