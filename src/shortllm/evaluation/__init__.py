"""Perplexity, zero-shot tasks and samples of models."""
