"""Splitting a model: over stages that run one after the other."""
