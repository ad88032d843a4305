"""Calibration text that a base writes itself.

amount.py     how much a recipe needs
prompts.py    what rows begin with: shipped prompts through the base's chat template, or plain starts
rows.py       rows as they are written, batch by batch, in a folder from which a killed run goes on
write.py      writes until it is enough
schedule.py   which rows are written next, and with which seeds
engine.py     what writes: vLLM or transformers
in_torch.py   writes rows with transformers
in_vllm.py    writes rows with vLLM
routing.py    counts the tokens that each expert gets
experts.py    chooses the rows from which every expert gets its share of tokens
"""
