"""Services for development and tests on one machine: a Hub stand-in, an S3 server, a stack, vLLM, and a tiny model."""
