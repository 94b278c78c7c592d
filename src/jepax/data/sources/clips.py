"""Clips of episodes: frames some steps apart, and the actions between them; from a folder, or simulated at opening.

A clip of T frames, k steps apart, that starts at step s of an episode:

    frames   s        s + k      ...   s + (T - 1) k
    actions  s:s + k  s + k:s + 2k     s + (T - 1) k:s + T k     each a block of k actions side by side

The block that leaves frame t is row t. A clip is used only if the last block, too, is in the episode.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, UInt8

from jepax.data.episodes import Episodes, Trajectories, concatenate_ranges, open_episodes, read_info
from jepax.data.simulate import POLICIES, frame_shape, make_environment, render, simulate
from jepax.data.sources import Source, SplitName, val_mask
from jepax.types import ClipBatch, UserError

MAX_FRAME_BYTES = 4_000_000_000
"""Frames of simulated episodes are in memory; more than this belongs into a folder."""


class ClipExample(NamedTuple):
    """One clip."""

    frames: UInt8[np.ndarray, "clip height width channels"]
    actions: Float32[np.ndarray, "clip block"]


@dataclass(frozen=True, eq=False)
class ClipSource(Source):
    """All clips of some episodes, in the order of episodes and steps: consecutive clips overlap."""

    episodes: Episodes
    members: Int64[np.ndarray, "members"]
    """Episodes of this split."""
    clip_frames: int
    """Frames of a clip."""
    frame_skip: int
    """Steps, and so actions, from one frame to the next."""
    action_mean: Float32[np.ndarray, "action"]
    """Mean of the training episodes' actions: z = (action - mean) / std."""
    action_std: Float32[np.ndarray, "action"]
    origin: dict[str, str]
    """The fingerprint."""

    def __len__(self) -> int:
        return len(self.first_rows)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Height, width and channels of a frame."""
        return self.episodes.frames.shape[1:]

    @property
    def block_dim(self) -> int:
        """Numbers in a block of actions."""
        return self.frame_skip * self.episodes.actions.shape[1]

    @cached_property
    def clips_per_member(self) -> Int64[np.ndarray, "members"]:
        """A clip has `clip_frames * frame_skip` actions; no action leaves an episode's last row."""
        return np.maximum(self.episodes.lengths[self.members] - self.clip_frames * self.frame_skip, 0)

    @cached_property
    def first_rows(self) -> Int64[np.ndarray, "clips"]:
        """Row of each clip's first frame."""
        return concatenate_ranges(self.episodes.starts[self.members], self.clips_per_member)

    def load_batch(
        self, rows: Int[np.ndarray, " batch"], index: Int[np.ndarray, " batch"] | None = None
    ) -> tuple[ClipBatch, Bool[np.ndarray, " batch"]]:
        """Reads all clips by one indexing, as none can be corrupt."""
        steps = self.first_rows[rows][:, None] + np.arange(self.clip_frames * self.frame_skip)
        frames = self.episodes.frames[steps[:, :: self.frame_skip]]

        # One number per coordinate and step, then `frame_skip` steps side by side: (batch, clip, frame_skip * action).
        actions = (self.episodes.actions[steps] - self.action_mean) / self.action_std
        actions = actions.reshape(len(rows), self.clip_frames, -1)
        index = np.asarray(rows if index is None else index, np.int32)
        return ClipBatch(frames, actions, index), np.zeros(len(rows), bool)

    def load(self, row: int) -> ClipExample:
        batch, _ = self.load_batch(np.array([row]))
        return ClipExample(batch.frames[0], batch.actions[0])

    def collate(self, examples: Iterable[ClipExample], index: Int32[np.ndarray, " batch"]) -> ClipBatch:
        frames, actions = zip(*examples, strict=True)
        return ClipBatch(np.stack(frames), np.stack(actions), index)

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.origin

    def display_name(self, row: int) -> str:
        episode = np.searchsorted(self.episodes.starts, self.first_rows[row], side="right") - 1
        return f"episode {episode}, step {self.first_rows[row] - self.episodes.starts[episode]}"

    def describe(self) -> str:
        short = int(np.sum(self.clips_per_member == 0))
        left_out = f"; {short:,} of them shorter than a clip" if short else ""
        return (
            f"{len(self):,} clips of {self.clip_frames} frames, {self.frame_skip} steps apart,"
            f" from {len(self.members):,} episodes{left_out}"
        )


def open_folder(root: Path, split: SplitName, val_fraction: float, clip_frames: int, frame_skip: int) -> ClipSource:
    """Opens one split of a folder of episodes; there is no test split.

    Raises `UserError` where the folder is not complete or is corrupt, and where a split has no episode or no clip.
    """
    if split == "test":
        raise UserError(
            f"data.root={root} has no test split: its episodes are for training and validation;\n"
            "collect others with another --seed, and set data.root to their folder"
        )
    episodes = open_episodes(root)
    if not np.isfinite(episodes.actions[concatenate_ranges(episodes.starts, episodes.lengths - 1)]).all():
        raise UserError(f"data.root={root}: its actions are not all finite; collect them again")
    train, members = (split_members(name, len(episodes), val_fraction) for name in ("train", split))
    mean, std = action_statistics(episodes, train)
    origin = {name: f"sha256 {digest[:12]}" for name, digest in read_info(root)["sha256"].items()}
    return check_clips(ClipSource(episodes, members, clip_frames, frame_skip, mean, std, origin), split)


def open_simulated(
    split: SplitName,
    *,
    environment: str,
    image_size: int,
    episodes: int,
    seed: int,
    val_fraction: float,
    clip_frames: int,
    frame_skip: int,
) -> ClipSource:
    """Simulates the noisy expert, and renders one split into memory.

    `episodes`: training episodes, held-out ones included; the test split has a fifth of them, of other keys. Actions of
    every split are standardized by those of the training episodes. Raises `UserError` for an image size that the
    environment does not draw, for frames beyond `MAX_FRAME_BYTES`, and where a split has no episode or no clip.
    """
    try:
        env = make_environment(environment, image_size)
    except UserError as error:
        raise UserError(f"data.canvas_size={image_size} does not fit data.dataset={environment}: {error}") from error
    pool = simulate(env, POLICIES["expert"], episodes, seed)
    mean, std = action_statistics(pool, split_members("train", episodes, val_fraction))
    if split == "test":
        pool = simulate(env, POLICIES["expert"], max(1, episodes // 5), seed, pool=1)

    # Only the split's own frames are rendered.
    found = pool.take(split_members(split, len(pool), val_fraction))
    check_memory(len(found.states) * math.prod(frame_shape(env)), environment, episodes, image_size)
    found = Episodes(found.actions, found.states, found.lengths, render(env, found.states))
    part = "test" if split == "test" else "training"
    origin = {"simulated episodes": f"{len(pool)} {part} ones of {environment}, {image_size} px, expert, seed {seed}"}
    return check_clips(ClipSource(found, np.arange(len(found)), clip_frames, frame_skip, mean, std, origin), split)


def check_memory(size: int, environment: str, episodes: int, image_size: int) -> None:
    """Raises `UserError` if the frames are too large for memory."""
    if size > MAX_FRAME_BYTES:
        raise UserError(
            f"data.num_episodes={episodes} at data.canvas_size={image_size} need {size / 1e9:.0f} GB of memory, and"
            f" {MAX_FRAME_BYTES / 1e9:.0f} GB are allowed;\nlower one of them, or collect them into a folder:\n"
            f"jepax collect {environment} --num-episodes {episodes} --image-size {image_size} --out FOLDER\n"
            "and read that: data.dataset=episodes, data.root=FOLDER"
        )


def split_members(split: SplitName, episodes: int, val_fraction: float) -> Int64[np.ndarray, "members"]:
    """The episodes of a split, ascending: whole ones are held out, the same at every seed of a run; or all for tests.

    Raises `UserError` where the held-out fraction leaves nothing for validation or for training.
    """
    if split == "test":
        return np.arange(episodes)
    mask = val_mask(np.zeros(episodes, np.int32), val_fraction)
    members = np.flatnonzero(mask if split == "validation" else ~mask)
    if not len(members):
        raise UserError(
            f"data.val_fraction={val_fraction} leaves no episode for the {split} split out of {episodes};"
            f" try {math.ceil(100 / max(episodes, 2)) / 100:g}, or more episodes"
        )
    return members


def action_statistics(
    episodes: Trajectories, members: Int64[np.ndarray, "members"]
) -> tuple[Float32[np.ndarray, "action"], Float32[np.ndarray, "action"]]:
    """Mean and standard deviation of every action of these episodes; an action that never changes has deviation 1."""
    rows = concatenate_ranges(episodes.starts[members], episodes.lengths[members] - 1)
    actions = episodes.actions[rows].astype(np.float64)
    if not len(rows):
        actions = np.zeros((1, actions.shape[1]))
    std = actions.std(axis=0)
    return actions.mean(axis=0).astype(np.float32), np.where(std == 0, 1, std).astype(np.float32)


def check_clips(source: ClipSource, split: SplitName) -> ClipSource:
    """Returns the source. Raises `UserError` if no episode is as long as a clip."""
    if not len(source):
        longest = source.episodes.lengths[source.members].max() - 1
        raise UserError(
            f"data.clip_frames={source.clip_frames} x data.frame_skip={source.frame_skip} is longer than the"
            f" {longest} actions of the longest episode of the {split} split; lower one of them"
        )
    return source
