"""I-JEPA on ImageNet-1k as published (Assran et al. 2023, arXiv:2301.08243).

Sources: [paper] is section 4 and appendix A; [config] is the public configs of the released code.

- Global batch 2048; AdamW; learning rate 2e-4 -> 1e-3 in 40 epochs of warm-up, then cosine to 1e-6; weight decay cosine
  0.04 -> 0.4, none on biases and norms; EMA 0.996 -> 1.0, linear. [paper, config]
- Four targets of scale 0.15-0.2 and aspect 0.75-1.5; context block of scale 0.85-1.0. [paper, config]
- Crops of scale 0.3-1.0, no flip, no color change; ImageNet's mean and standard deviation. [config]
- Predictor: width 384; depth 6 (B/16), 12 (L/16, H/14, H/16 at 448) or 16 (g/16); the encoder's number of heads.
  [paper, config]
- Epochs: B/16 and L/16 600, H/14 and H/16 at 448 px 300. [paper] g/16 on ImageNet-22k: 44, 3 of them warm-up. [config]

Not published: the number of context patches. The released code truncates each batch's contexts to the shortest, so
the number depends on the batch per GPU; we use the mean at 128 images per GPU: 50 on a 14x14 grid, 69 on 16x16, 234 on
28x28 (simulated, 20,000 steps). We round 69 to 70: fused attention on a GPU has a gradient for even numbers only, and
would otherwise pad every layer.
"""

from jepax.data import DataConfig
from jepax.masking import MultiBlockConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.nn import VIT_SIZES, PredictorConfig, ViTConfig
from jepax.recipes.registry import override, recipe
from jepax.training.config import Config, TrainConfig


@recipe
def ijepa_vitb16_in1k() -> Config:
    """I-JEPA ViT-B/16 at 224 px, 600 epochs. Reported linear top-1: 72.9 (paper, table 1).

    `jepax train ijepa_vitb16_in1k --data.root PATH`, where PATH has train/CLASS/*.JPEG and val/CLASS/*.JPEG.
    """
    return Config(
        method=IJEPAConfig(
            encoder=ViTConfig(patch_size=16, **VIT_SIZES["base"]),
            predictor=PredictorConfig(width=384, depth=6, num_heads=12),
            masks=MultiBlockConfig(num_context_patches=50),
        ),
        data=DataConfig(dataset="image_folder", canvas_size=512, val_fraction=0.01, num_threads=16),
        train=TrainConfig(batch_size=2048, epochs=600.0),
    )


def _sized(size: str, patch: int, side: int, context: int, epochs: float, *, predictor_depth: int = 12) -> Config:
    """The same experiment with another encoder, scanned, with matrix products saved for the backward pass."""
    encoder = ViTConfig(patch_size=patch, scan_layers=True, remat="dots", **VIT_SIZES[size])
    predictor = {"width": 384, "depth": predictor_depth, "num_heads": encoder.num_heads}
    changes = {
        "method.encoder": encoder,
        "method.predictor": PredictorConfig(**predictor, scan_layers=True, remat="dots"),
        "method.masks.num_context_patches": context,
        "method.crop.size": (side, side),
        "train.epochs": epochs,
    }
    return override(ijepa_vitb16_in1k(), changes)


@recipe
def ijepa_vitl16_in1k() -> Config:
    """I-JEPA ViT-L/16 at 224 px, 600 epochs. Reported linear top-1: 77.5 (paper, table 1)."""
    return _sized("large", 16, 224, context=50, epochs=600.0)


@recipe
def ijepa_vith14_in1k() -> Config:
    """I-JEPA ViT-H/14 at 224 px, 300 epochs. Reported linear top-1: 79.3 (paper, table 1)."""
    return _sized("huge", 14, 224, context=70, epochs=300.0)


@recipe
def ijepa_vith16_448_in1k() -> Config:
    """I-JEPA ViT-H/16 at 448 px, 300 epochs. Reported linear top-1: 81.1 (paper, table 1)."""
    return _sized("huge", 16, 448, context=234, epochs=300.0)


@recipe
def ijepa_vitg16_in22k() -> Config:
    """I-JEPA ViT-g/16 at 224 px on ImageNet-22k, 44 epochs, as in the public code. Reported: on transfer tasks only.

    PATH/train/CLASS/* and PATH/val/CLASS/*, as for ImageNet-1k. A state too large for one device is sharded over all.
    There is no evaluation at the end, because the features of 14 million images fit no memory:
    `jepax evaluate RUN --protocols linear --data.root IMAGENET_1K`.
    """
    config = _sized("giant", 16, 224, context=50, epochs=44.0, predictor_depth=16)
    return override(config, {"optim.warmup_epochs": 3.0, "eval.protocols": ()})
