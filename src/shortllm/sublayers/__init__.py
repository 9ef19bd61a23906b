"""Remove the attention or the MLP of single blocks, as plain checkpoints."""
