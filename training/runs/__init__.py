"""What keeps runs: their configuration, folder, checkpoints, logs, and what their command lines share."""
