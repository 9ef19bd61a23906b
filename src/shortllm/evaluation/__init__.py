"""Perplexity, tasks and samples of models."""
