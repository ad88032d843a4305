"""What runs, in which order, where; and the command line."""
