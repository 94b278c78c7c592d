"""Spellings that people bring from other code bases end at the right field, or at a list: never at a wrong one."""

import pytest

from jepax.commands.parsing import to_field_path
from jepax.commands.synonyms import closest_field
from jepax.commands.train import Train
from jepax.io import config_yaml as configs
from jepax.recipes import RECIPES

IJEPA, VICREG, LEJEPA = "ijepa_fashion_mnist", "vicreg_fashion_mnist", "lejepa_fashion_mnist"
TIMM = {
    "--lr": "optim.peak_lr",
    "--opt": "optim.name",
    "--opt-eps": "optim.eps",
    "--opt-betas": "optim.beta1",
    "--weight-decay": "optim.weight_decay",
    "--clip-grad": "optim.grad_clip_norm",
    "--warmup-lr": "optim.start_lr",
    "--min-lr": "optim.final_lr",
    "--warmup-epochs": "optim.warmup_epochs",
    "--epochs": "train.epochs",
    "--batch-size": "train.batch_size",
    "-b": None,
    "--grad-accum-steps": "train.grad_accum_steps",
    "--log-interval": "train.log_every_steps",
    "--checkpoint-hist": "train.checkpoint.max_to_keep",
    "--eval-metric": "train.checkpoint.best_metric",
    "--log-wandb": "train.loggers",
    "--amp": "train.compute_dtype",
    "--amp-dtype": "train.compute_dtype",
    "--seed": "seed",
    "--dataset": "data.dataset",
    "--data-dir": "data.root",
    "--workers": "data.num_workers",
    "--img-size": "method.crop.size",
    "--crop-pct": "method.crop.eval_resize_ratio",
    "--mean": "method.crop.mean",
    "--std": "method.crop.std",
    "--scale": "method.crop.scale",
    "--ratio": "method.crop.ratio",
    "--hflip": "method.crop.hflip_prob",
    "--train-interpolation": "method.crop.interpolation",
    "--in-chans": "method.encoder.in_channels",
    "--model-ema-decay": "method.ema.start",
    "--smoothing": "eval.finetune.label_smoothing",
    "--layer-decay": "eval.finetune.layer_decay",
    "--gp": None,
    "--num-classes": None,
    "--drop-path": None,
    "--mixup": None,
    "--cutmix": None,
    "--reprob": None,
    "--aa": None,
    "--output": "run_dir",
    "--embed-dim": "method.encoder.width",
    "--num-heads": "method.encoder.num_heads",
    "--depth": "method.encoder.depth",
    "--mlp-ratio": "method.encoder.mlp_ratio",
    "--patch-size": "method.encoder.patch_size",
    "--grad-checkpointing": "method.encoder.remat",
    "--global-pool": "eval.pool",
}
PUBLIC_IJEPA = {
    "--data.batch_size": "train.batch_size",
    "--data.crop_size": "method.crop.size",
    "--data.crop_scale": "method.crop.scale",
    "--data.image_folder": "data.root",
    "--data.root_path": "data.root",
    "--data.num_workers": "data.num_workers",
    "--data.use_horizontal_flip": "method.crop.hflip_prob",
    "--logging.folder": None,
    "--mask.aspect_ratio": "method.masks.target_aspect_ratio",
    "--mask.enc_mask_scale": "method.masks.context_scale",
    "--mask.pred_mask_scale": "method.masks.target_scale",
    "--mask.min_keep": "method.masks.num_context_patches",
    "--mask.num_pred_masks": "method.masks.num_targets",
    "--mask.patch_size": "method.encoder.patch_size",
    "--meta.pred_depth": "method.predictor.depth",
    "--meta.pred_emb_dim": "method.predictor.width",
    "--meta.use_bfloat16": "train.compute_dtype",
    "--optimization.ema": "method.ema.start",
    "--optimization.epochs": "train.epochs",
    "--optimization.final_lr": "optim.final_lr",
    "--optimization.final_weight_decay": "optim.final_weight_decay",
    "--optimization.ipe_scale": "optim.schedule_stretch",
    "--optimization.lr": "optim.peak_lr",
    "--optimization.start_lr": "optim.start_lr",
    "--optimization.warmup": "optim.warmup_epochs",
    "--optimization.weight_decay": "optim.weight_decay",
}
DINO = {
    "--patch_size": "method.encoder.patch_size",
    "--momentum_teacher": "method.ema.start",
    "--weight_decay_end": "optim.final_weight_decay",
    "--clip_grad": "optim.grad_clip_norm",
    "--batch_size_per_gpu": "train.batch_size",
    "--optimizer": "optim.name",
    "--use_fp16": "train.compute_dtype",
    "--saveckp_freq": "train.checkpoint.every_steps",
    "--data_path": "data.root",
    "--output_dir": "run_dir",
    "--num_workers": "data.num_workers",
    "--nb_knn": "eval.knn.k",
    "--temperature": "eval.knn.temperatures",
}
DINO_VIEWS = {
    "--out_dim": "method.projector.out_dim",
    "--global_crops_scale": "method.views.global_crop.scale",
    "--global_crops_size": "method.views.global_crop.size",
    "--local_crops_number": "method.views.num_local",
    "--local_crops_scale": "method.views.local_crop.scale",
    "--local_crops_size": "method.views.local_crop.size",
}
PUBLIC_VICREG = {
    "--sim-coeff": "method.sim_coeff",
    "--std-coeff": "method.std_coeff",
    "--cov-coeff": "method.cov_coeff",
    "--base-lr": "optim.peak_lr",
    "--wd": "optim.weight_decay",
    "--mlp": "method.projector.hidden_dims",
    "--exp-dir": "run_dir",
    "--log-freq-time": None,
    "--invariance": "method.sim_coeff",
    "--variance": "method.std_coeff",
    "--covariance": "method.cov_coeff",
    "--gaussian-blur": "method.views.color.blur_prob",
    "--solarization": "method.views.color.solarize_prob",
    "--grayscale": "method.views.color.grayscale_prob",
    "--color-jitter-prob": "method.views.color.jitter_prob",
    "--horizontal-flip": "method.views.global_crop.hflip_prob",
    "--num-large-crops": "method.views.num_global",
    "--num-small-crops": "method.views.num_local",
    "--proj-hidden-dim": "method.projector.hidden_dims",
    "--proj-output-dim": "method.projector.out_dim",
}
PUBLIC_LEJEPA = {
    "--lambda": "method.sigreg_weight",
    "--lamb": "method.sigreg_weight",
    "--num_slices": "method.num_slices",
    "--num-projections": "method.num_slices",
    "--proj_dim": "method.projector.out_dim",
}
OPTAX_AND_ORBAX = {
    "--learning-rate": "optim.peak_lr",
    "--peak-value": "optim.peak_lr",
    "--init-value": "optim.start_lr",
    "--end-value": "optim.final_lr",
    "--warmup-steps": "optim.warmup_epochs",
    "--b1": "optim.beta1",
    "--b2": "optim.beta2",
    "--max-norm": "optim.grad_clip_norm",
    "--every-k-schedule": "train.grad_accum_steps",
    "--max-consecutive-errors": "train.grad_guard.max_consecutive_nonfinite",
    "--save-interval-steps": "train.checkpoint.every_steps",
    "--max-to-keep": "train.checkpoint.max_to_keep",
    "--keep-period": "train.checkpoint.keep_period",
    "--best-fn": "train.checkpoint.best_metric",
}
TORCHTITAN = {
    "--optimizer.lr": "optim.peak_lr",
    "--optimizer.name": "optim.name",
    "--optimizer.eps": "optim.eps",
    "--lr_scheduler.warmup_steps": "optim.warmup_epochs",
    "--training.local_batch_size": "train.batch_size",
    "--training.global_batch_size": "train.batch_size",
    "--training.steps": "train.steps",
    "--training.max_norm": "optim.grad_clip_norm",
    "--training.seed": "seed",
    "--training.dataset": "data.dataset",
    "--training.dataset_path": "data.root",
    "--training.mixed_precision_param": "train.compute_dtype",
    "--parallelism.data_parallel_shard_degree": "train.sharding.params",
    "--checkpoint.interval": "train.checkpoint.every_steps",
    "--checkpoint.keep_latest_k": "train.checkpoint.max_to_keep",
    "--metrics.log_freq": "train.log_every_steps",
    "--metrics.enable_wandb": "train.loggers",
    "--activation_checkpoint.mode": "method.encoder.remat",
    "--validation.freq": "eval.online.every_steps",
    "--job.dump_folder": "run_dir",
}
BIG_VISION_AND_HF = {
    "--grad_clip_norm": "optim.grad_clip_norm",
    "--wd": "optim.weight_decay",
    "--total_epochs": "train.epochs",
    "--total_steps": "train.steps",
    "--log_training_steps": "train.log_every_steps",
    "--ckpt_steps": "train.checkpoint.every_steps",
    "--keep_ckpt_steps": "train.checkpoint.keep_period",
    "--input.batch_size": "train.batch_size",
    "--model.width": "method.encoder.width",
    "--model.depth": "method.encoder.depth",
    "--model.num_heads": "method.encoder.num_heads",
    "--model.patch_size": "method.encoder.patch_size",
    "--hidden_size": "method.encoder.width",
    "--num_hidden_layers": "method.encoder.depth",
    "--num_attention_heads": "method.encoder.num_heads",
    "--image_size": "method.crop.size",
    "--gradient_accumulation_steps": "train.grad_accum_steps",
    "--per_device_train_batch_size": "train.batch_size",
    "--max_grad_norm": "optim.grad_clip_norm",
    "--num_train_epochs": "train.epochs",
    "--save_total_limit": "train.checkpoint.max_to_keep",
    "--report_to": "train.loggers",
    "--bf16": "train.compute_dtype",
    "--dtype": "train.compute_dtype",
    "--adam_beta1": "optim.beta1",
    "--eval_steps": "eval.online.every_steps",
    "--n_heads": "method.encoder.num_heads",
    "--predictor.n_heads": "method.predictor.num_heads",
    "--eval.finetune.lr": "eval.finetune.learning_rates",
}
GROUPS = (
    *((IJEPA, group) for group in (TIMM, PUBLIC_IJEPA, DINO, OPTAX_AND_ORBAX, TORCHTITAN, BIG_VISION_AND_HF)),
    *((VICREG, group) for group in (DINO_VIEWS, PUBLIC_VICREG)),
    (LEJEPA, PUBLIC_LEJEPA),
)
SPELLINGS = [(recipe, flag, field) for recipe, group in GROUPS for flag, field in group.items()]
"""A recipe, a flag of another code base, and the field that means the same; None: jepax has none."""

renamed = pytest.mark.skipif(
    "method.encoder.num_heads" not in configs.flatten(RECIPES[IJEPA]()), reason="old field names"
)


def answer(recipe, flag, fields=None):
    """The field that a flag sets, or that its error suggests."""
    fields = list(configs.flatten(RECIPES[recipe]())) if fields is None else fields
    name = to_field_path(flag)
    return name if name in fields else closest_field(name, [*fields, *Train.options()])


@renamed
def test_most_spellings_end_at_the_right_field_and_none_at_a_wrong_one():
    answers = {(recipe, flag): (answer(recipe, flag), field) for recipe, flag, field in SPELLINGS}
    wrong = {case: pair for case, pair in answers.items() if pair[0] is not None and pair[0] != pair[1]}
    assert not wrong
    assert len(answers) >= 100
    assert sum(found == field for found, field in answers.values()) >= 0.95 * len(answers)
