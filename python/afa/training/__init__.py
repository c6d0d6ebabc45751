"""The parts of training: schedule, one step, checkpoints, the log. `afa.train` puts them together."""
