"""Which criterion to trust, and what to remove: blocks, or heads and neurons."""
