"""What the quantize child is made of, and how it is watched. No module here knows Prefect.

In the child (auto-round, torch, transformers):
choose.py     settings from the card and the model, each with its reason
samples.py    calibration samples
tune.py       auto-round's tuning loop of a block, rearranged for a GPU
delta.py      the gated delta rule in matrix products
carry.py      what a killed or moved run goes on from
"""
