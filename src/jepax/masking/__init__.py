"""Masks drawn on the device: patch indices of static shape, one key per image."""

from jepax.masking.multiblock import MultiBlock, MultiBlockConfig, block_sizes

__all__ = ["MultiBlock", "MultiBlockConfig", "block_sizes"]
