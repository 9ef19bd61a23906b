"""Width pruning, for comparison with depth pruning: heads and neurons go, all blocks stay."""
