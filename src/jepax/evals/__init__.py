"""Evaluation of encoders: protocols with their baselines and controls, reports, and scores during training."""
