"""What the quantize stage is made of: a child process that runs auto-round, and what watches it.

ladder.py          starts and watches the child, and steps to settings that need less memory
child.py           the process itself
auto_settings.py   settings from the GPU and the model, each with its reason
samples.py         the calibration samples
events.py          what the child tells of its progress
resume.py          what a killed or moved run goes on from
loop/              the tuning loop, in less time than auto-round's
"""
