"""The flows: which stages run, in which order and where; and the command line."""
