"""Speed and memory of models, measured in interleaved runs."""
