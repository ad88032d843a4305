"""What the quantize stage is made of: a child process that runs auto-round, and what watches it.

ladder.py          starts and watches the child, and steps to settings that need less memory
child.py           the process itself
auto_settings.py   settings from the GPU and the model, each with its reason
samples.py         the calibration samples
auto_round.py      every name of auto-round's that is replaced meanwhile, in one table
events.py          what the child tells of its progress, written and read
reporting.py       how auto-round's progress becomes events
resume.py          what a killed or moved run goes on from
loop/              the tuning loop, in less time than auto-round's
"""
