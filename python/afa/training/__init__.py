"""The parts of training: schedule, one step, checkpoints, the log. `afa.training.loop` puts them together."""
