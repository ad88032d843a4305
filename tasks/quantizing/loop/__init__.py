"""Our tuning loop, which replaces auto-round's: the same algorithm in less time.

tune.py              the steps of a block
flat_weights.py      its quantized weights, as one matrix of groups
batches.py           batches of its samples on the device
sign_sgd.py          sign descent on the parameters
best_iteration.py    which rounding is kept
ranks.py             what the processes of a run on several GPUs exchange
passes.py            forward passes over all samples
gated_delta_rule.py  the delta rule of linear attention in matrix products
profile.py           where the time goes
"""
