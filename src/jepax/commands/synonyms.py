"""Meaning of a misspelled or foreign name of a field: spellings from timm, DINO, VICReg, I-JEPA, optax, and others.

An error must name the right field or none: a wrong suggestion costs a run. So a table of synonyms comes first, then the
last part of a path alone, then similar spellings (`SIMILAR`); else the error lists the fields there are.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher

from jepax.io.config_yaml import SIMILAR

SYNONYMS = {
    # optimizer: optax, timm, HF, torchtitan
    "optim.name": "opt optimizer optimizer_name optim optax_name optimizer_type",
    "optim.peak_lr": "lr learning_rate base_lr blr max_lr peak_value peak_learning_rate base_learning_rate",
    "optim.start_lr": "warmup_lr warmup_start_lr init_lr initial_lr init_value warmup_init_lr",
    "optim.final_lr": "min_lr end_lr end_value lr_min lr_end eta_min min_lr_factor",
    "optim.warmup_epochs": "warmup warmup_steps num_warmup_steps warmup_ratio n_warmup",
    "optim.weight_decay": "wd weight_decay weight_decay_rate l2",
    "optim.final_weight_decay": "final_wd weight_decay_end wd_end end_weight_decay",
    "optim.beta1": "b1 adam_beta1 betas opt_betas adam_betas",
    "optim.beta2": "b2 adam_beta2",
    "optim.eps": "epsilon opt_eps adam_eps adam_epsilon",
    "optim.grad_clip_norm": "clip_grad grad_clip max_grad_norm max_norm clip_norm gradient_clip_val clip"
    " clip_by_global_norm",
    "optim.schedule_stretch": "ipe_scale horizon",
    # learning rates of the protocols: only for names that begin with theirs, such as eval.finetune.lr
    "learning_rates": "lr learning_rate lrs",
    "weight_decays": "weight_decay wd",
    # training and its batches: HF, MAE, timm, torchtitan, big_vision
    "train.batch_size": "batch_size bs batch batch_size_per_gpu local_batch_size global_batch_size train_batch_size"
    " per_device_train_batch_size",
    "train.epochs": "epochs num_epochs n_epochs max_epochs num_train_epochs total_epochs",
    "train.steps": "num_steps max_steps total_steps training_steps train_steps iterations max_iters total_iters",
    "train.grad_accum_steps": "accum_iter accumulate gradient_accumulation_steps accumulate_grad_batches grad_accum"
    " num_microbatches every_k_schedule",
    "train.compute_dtype": "dtype precision mixed_precision amp amp_dtype use_fp16 use_bfloat16 fp16 bf16 half"
    " mixed_precision_param",
    "train.log_every_steps": "log_every log_interval log_freq log_steps logging_steps print_freq log_training_steps"
    " log_every_n_steps metrics.log_freq",
    "train.loggers": "trackers logger report_to wandb log_wandb use_wandb enable_wandb tensorboard enable_tensorboard",
    "train.sharding.params": "fsdp ddp sharding_strategy data_parallel_shard_degree data_parallel_replicate_degree",
    # checkpoints: orbax, DINO, torchtitan, HF, timm, big_vision
    "checkpoint.every_steps": "save_interval_steps save_freq saveckp_freq save_every save_steps ckpt_steps"
    " checkpoint_freq checkpoint_interval checkpoint.interval checkpoint_every save_interval",
    "checkpoint.max_to_keep": "keep_latest_k save_total_limit checkpoint_hist keep_last",
    "checkpoint.keep_period": "keep_ckpt_steps keep_every",
    "checkpoint.best_metric": "best_fn monitor eval_metric metric_for_best_model",
    "grad_guard.max_consecutive_nonfinite": "max_consecutive_errors patience",
    # data
    "seed": "random_seed rng_seed manual_seed",
    "data.dataset": "dataset dataset_name data_set source",
    "data.root": "data_dir data_path root_path data_root dataset_dir dataset_path image_folder imagenet_folder",
    "data.val_fraction": "val_split validation validation_split valid_split val_ratio val_pct",
    "data.num_workers": "workers n_workers dataloader_num_workers",
    "data.num_threads": "threads n_threads",
    "data.num_episodes": "n_episodes episodes",
    "data.clip_frames": "num_frames clip_length sequence_length seq_len num_steps_per_clip",
    "data.frame_skip": "frameskip frame_stride action_repeat",
    # networks: timm, HF, nanoGPT, flax, MaxText, I-JEPA
    "encoder.width": "width embed_dim hidden_size hidden_dim dim d_model n_embd emb_dim embedding_dim model_dim",
    "encoder.depth": "depth num_layers n_layers num_hidden_layers n_layer num_blocks",
    "encoder.num_heads": "num_heads heads n_heads n_head nheads num_attention_heads num_attn_heads",
    "encoder.patch_size": "patch_size patch",
    "encoder.in_channels": "in_chans num_channels input_channels in_ch",
    "encoder.mlp_ratio": "mlp_ratio mlp_dim intermediate_size ffn_ratio",
    "encoder.init_std": "init_std initializer_range",
    "encoder.scan_layers": "scan_layers scan",
    "encoder.remat": "remat grad_checkpointing gradient_checkpointing activation_checkpoint activation_checkpointing"
    " activation_checkpoint.mode remat_policy use_checkpoint checkpoint_activations",
    "predictor.width": "pred_emb_dim predictor_embed_dim pred_embed_dim pred_dim predictor.embed_dim",
    "predictor.depth": "pred_depth predictor_depth predictor.num_layers",
    "predictor.num_heads": "pred_heads pred_num_heads predictor.heads predictor.n_heads",
    "projector.hidden_dims": "proj_hidden_dim mlp projector_dims hidden_proj_dim",
    "projector.out_dim": "proj_dim proj_output_dim projection_dim projector_dim",
    # masks, crops and colors: I-JEPA, DINO, timm, solo-learn, torchvision
    "masks.num_targets": "num_pred_masks npred num_target_blocks n_targets num_masks num_target_masks",
    "masks.target_scale": "pred_mask_scale",
    "masks.target_aspect_ratio": "aspect_ratio target_aspect",
    "masks.context_scale": "enc_mask_scale",
    "masks.num_context_patches": "min_keep num_context",
    "crop.size global_crop.size local_crop.size": "image_size img_size crop_size input_size resolution",
    "global_crop.size": "global_crops_size global_crop_size",
    "local_crop.size": "local_crops_size local_crop_size",
    "crop.scale global_crop.scale": "crop_scale",
    "global_crop.scale": "global_crops_scale global_crop_scale",
    "local_crop.scale": "local_crops_scale local_crop_scale",
    "crop.interpolation global_crop.interpolation": "interpolation train_interpolation resample resample_mode filter",
    "crop.hflip_prob global_crop.hflip_prob": "hflip flip horizontal_flip use_horizontal_flip horizontal_flip_prob",
    "crop.eval_resize_ratio global_crop.eval_resize_ratio": "crop_pct",
    "crop.mean global_crop.mean": "mean img_mean image_mean normalize_mean",
    "crop.std global_crop.std": "std img_std image_std normalize_std",
    "views.num_global": "global_crops_number num_global_crops n_global_views num_large_crops",
    "views.num_local": "local_crops_number num_local_crops n_local_views num_small_crops",
    "color.jitter_prob": "color_jitter_prob",
    "color.brightness": "color_jitter color_jitter_strength",
    "color.grayscale_prob": "grayscale gray_scale gray grey",
    "color.blur_prob": "blur gaussian_blur gaussian_blur_prob gaussian_prob",
    "color.solarize_prob": "solarize solarization solarization_prob",
    # losses: I-JEPA, VICReg, LeJEPA
    "method.loss": "loss_fn loss_type criterion",
    "method.smooth_l1_beta": "beta smoothl1_beta",
    "method.sigreg_weight method.visreg_weight method.rdmreg_weight method.regularizer.weight": "lambda lambd lamb"
    " lmbda lam weight reg_weight reg_coeff",
    "method.sigreg_weight": "sigreg_lambda",
    "method.rdmreg_weight": "matching",
    "method.regularizer.name": "regularizer reg",
    "num_slices": "directions num_directions num_projections n_projections num_proj n_slices sketch_dim",
    "method.sim_coeff": "lambda",
    "method.sim_coeff method.invariance_weight": "sim_coeff sim_weight inv_coeff inv_weight invariance"
    " invariance_weight sim_loss_weight",
    "method.std_coeff regularizer.variance_weight": "std_coeff std_weight var_coeff var_weight variance"
    " variance_weight var_loss_weight",
    "method.cov_coeff regularizer.covariance_weight": "cov_coeff cov_weight covariance covariance_weight"
    " cov_loss_weight",
    "ema.start": "ema_decay ema momentum momentum_teacher model_ema_decay base_momentum ema_momentum tau base_tau",
    "ema.end": "final_momentum ema_end momentum_end final_tau",
    # evaluation: DINO, scikit-learn, torchtitan, HF
    "eval.protocols": "protocol evaluators",
    "eval.pool": "global_pool pooling pool_type",
    "eval.knn.k": "k nb_knn knn_k num_neighbors n_neighbors neighbors neighbours",
    "eval.knn.temperatures": "temperature knn_temperature knn_t",
    "online.every_steps": "eval_freq eval_interval eval_steps eval_every val_every validation_freq validation.freq",
    "eval.finetune.label_smoothing": "smoothing",
    # options of the commands themselves
    "run_dir": "output_dir out_dir work_dir workdir log_dir logdir save_dir exp_dir output dump_folder rundir",
    "dry_run": "dryrun",
    "distributed": "dist_url world_size local_rank multihost rank",
}
"""Fields, or the ends of their paths -> other spellings. Among fields of one spelling, the first one comes first."""

ANSWERS = {
    **dict.fromkeys(("num_classes", "nb_classes"), "the data has the number of classes; methods do not need it"),
    **dict.fromkeys(
        ("resume", "resume_from", "resume_from_checkpoint", "load_checkpoint"),
        "the same command again resumes its run",
    ),
}
"""Answers to names that need no field."""


def way_out(name: str, fields: Sequence[str], also: Sequence[str] = ()) -> str:
    """The end of an error about a field that does not exist: the field that is meant, or those there are.

    `also`: options of the command, which may be meant, too.
    """
    parents, _, last = name.rpartition(".")
    if last in ANSWERS:
        return ANSWERS[last]
    if found := _candidates(name, [*fields, *also]):
        return f"did you mean {'one of ' if len(found) > 1 else ''}{', '.join(map(to_flag, found))}?"
    group = [field[len(parents) + 1 :].split(".")[0] for field in fields if field.startswith(f"{parents}.")]
    return f"{parents} has {', '.join(dict.fromkeys(group))}" if group else "--help after the recipe lists every field"


def closest_field(name: str, fields: Sequence[str]) -> str | None:
    """The one field that the name means; None if there is none, or more than one."""
    found = _candidates(name, fields)
    return found[0] if len(found) == 1 else None


def to_flag(path: str) -> str:
    """`optim.peak_lr` as `--optim.peak-lr`."""
    return f"--{path.replace('_', '-')}"


def _candidates(name: str, fields: Sequence[str]) -> list[str]:
    """The fields that the name may mean: one if that is clear."""
    parents, _, last = name.lower().rpartition(".")
    # From the full path to its last part: the longer the part that is found, the surer.
    for start in range(name.count(".") + 1):
        tail = name.lower().split(".", start)[-1]
        targets = [target for row, spellings in SYNONYMS.items() if tail in spellings.split() for target in row.split()]
        known = [field for target in targets for field in fields if _ends(field, target)]
        if best := _nearest_group([*known, *(field for field in fields if _ends(field, tail))], parents):
            return best[:1] if best[0] in known else best
    # Then a similar spelling: in the group that was named, or anywhere.
    group = [field for field in fields if parents and field.startswith(f"{parents}.")] or fields
    alike = {field: SequenceMatcher(None, last, field.rpartition(".")[2]).ratio() for field in group}
    most = max(alike.values(), default=0.0)
    return _nearest_group([field for field in group if alike[field] == most >= SIMILAR], parents)


def _nearest_group(found: Sequence[str], parents: str) -> list[str]:
    """The fields whose groups are most like `parents`, which may be misspelled or empty."""

    def score(field: str) -> tuple[int, float]:
        group = field.rpartition(".")[0]
        alike = SequenceMatcher(None, parents, group).ratio()
        return len(set(parents.split(".")) & set(group.split("."))), alike if alike >= SIMILAR else 0.0

    scores = {field: score(field) for field in found}
    return [field for field in scores if scores[field] == max(scores.values())]


def _ends(field: str, tail: str) -> bool:
    return f".{field}".endswith(f".{tail}")
