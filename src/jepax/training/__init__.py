"""Training: the config, the step, the loop, and the monitor."""
