"""Quantize a Hugging Face base model, prove that the result works, and publish it.

The folders `flows/` and `tasks/` of the project are links in this package. So their modules have one name,
`requant.flows...` and `requant.tasks...`, in a checkout, in an installation and for every tool that reads the code, and
a `tasks.py` or a `flows/` of a user's own never takes their place.
"""

__version__ = "0.1.0"
