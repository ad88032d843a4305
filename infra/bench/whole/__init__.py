"""A model of Qwen3.6-27B's shapes through all stages on one machine: `make run-27b`.

The base has random weights. The Hub stand-in serves it, `requant plan` and `requant run` do the rest, and a sampler
notes memory, GPU memory and disk. What was measured is written beside what the plan said.
"""
