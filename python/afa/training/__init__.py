"""Training: schedule, training step, checkpoints and log. `afa.training.loop` is the entry point."""
