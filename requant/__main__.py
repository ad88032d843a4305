"""Run the command line: `python -m requant`."""

from requant.flows.cli.main import main

main()
