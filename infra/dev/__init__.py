"""What development and tests need on one machine: stand-ins for the Hub and S3, a Prefect stack, vLLM, a tiny model."""
