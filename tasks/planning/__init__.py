"""What a run will do, from headers and configs alone. No module here knows Prefect, nor torch.

layers.py    which layers auto-round packs, and the quantization config that it writes
output.py    the checkpoint that comes out, to the byte
refusals.py  what would stop a run
moves.py     what is here already, what must be moved
needs.py     disk, memory, GPU memory
figures.py   how long a stage takes, from earlier runs or a table
changes.py   what the base's new revision changed
"""
