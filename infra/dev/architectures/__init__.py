"""Writes what `tasks/checkpoint/completeness` knows about architectures, from the pinned transformers."""
