"""The command line, with one file per command. `main.py` is the entry point."""
