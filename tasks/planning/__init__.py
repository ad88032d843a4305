"""What a run will do, from headers and configs alone. No module here imports Prefect or torch.

document.py      the plan itself: what `requant plan --json` prints
inputs.py        what a run reads from outside: the base at a commit, and the texts
base_headers.py  the base without its weights
layers.py        which layers auto-round packs, and the quantization config that it writes
groups.py        group sizes that do not divide a layer, and what `group_size: auto` comes to
output.py        the checkpoint that comes out, to the byte
outputs.py       one plan for several outputs of a recipe
stages.py        which stages would run, and what each moves, takes and costs
reasons.py       why a tensor is not quantized, for the plan and the card
checks.py        what would stop a run: the base, as inspect sees it, and a result that no engine loads
tokenizer.py     whether the base has a tokenizer that can be loaded
texts.py         what is wrong with the texts of a run
transfers.py     what is here already, and what must be fetched or sent
resources.py     disk, memory and GPU memory
durations.py     how long a stage takes, from earlier runs or a table
base_diff.py     what the base's new revision changed
"""
