"""Weights that leave a run: safetensors and Hugging Face folders."""
