"""A checkpoint from a checkpoint: derived, guarded, verified."""
