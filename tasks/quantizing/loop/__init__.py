"""Our tuning loop, which replaces auto-round's: the same algorithm in less time."""
