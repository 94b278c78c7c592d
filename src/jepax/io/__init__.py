"""Files of a run: checkpoints, config, logs, events, locks."""
