"""Safetensors checkpoints as files: read, laid out, rewritten, without loading a model and without torch."""
