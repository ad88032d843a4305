"""Run the command line: `python -m requant`."""

from requant.startup import main

main()
