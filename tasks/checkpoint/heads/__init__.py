"""MTP heads: the layouts in which families store them, and which engines draft with each.

layout.py       what describes a layout, and how a tensor's name is taken apart
layouts.py      the table of layouts
drafters.py     draft models in repos of their own
missing.py      what a head lacks, and how many layers it should have

Which engines draft with a head is in compat/drafting.py.
"""
