"""Seeded checkpoints that have a model's architecture and not its weights: real classes, real files, small."""
