"""A checkpoint in an inference engine: starting one and ending it for sure, asking it, counting what it does."""
