"""The tuning loop that takes the place of auto-round's: the same algorithm, in less time."""
