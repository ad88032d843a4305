"""The parts of the stage quantize: a child process that runs auto-round, and the code that starts and watches it.

The stage itself is `tasks/quantize.py`. Its settings are the section `quantize` of a recipe, in
`tasks/recipe/quantize_section.py`.

job.py              what the child is asked to do, and its result
memory_fallback.py  starts and watches the child, and restarts it with lower memory use
failures.py         how quantizing can fail, classified by what helps
child.py            the process itself
peers.py            starts and watches the other processes of a run on several GPUs
auto_settings.py    settings chosen from the GPU and the model, with reasons
samples.py          the calibration samples
auto_round.py       all names of auto-round that are replaced at run time, in one table
events.py           the child's events, written and read
reporting.py        turns auto-round's progress into events
tuned_blocks.py     turns the events into the record of each block
next_block.py       loads the next block while one is tuned, and clears the memory between them
finished_blocks.py  packs and writes a tuned block while the next one is tuned
resume.py           continues a run that was killed or moved to another machine
loop/               our tuning loop: auto-round's, but faster
"""
