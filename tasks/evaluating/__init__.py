"""Running the tasks of lm-eval. What asks for it is `tasks/evaluate.py`, for the base and for the result.

definitions.py  lm-eval's tasks: what there is, and which data sets it reads
harness.py      lm-eval with a model in torch, or with one that vLLM serves
outcomes.py     the scores of one checkpoint, and the value of every item
rounds.py       items in rounds, until each comparison with the base is decided
"""
