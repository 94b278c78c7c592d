"""Evaluation of encoders: protocols and what they stand beside, scores during training, health and its watchdog."""
