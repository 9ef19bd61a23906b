"""Depth pruning: score blocks, plan a removal, write the shorter checkpoint."""
