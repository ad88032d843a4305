"""Measuring a checkpoint in an inference engine: starting and ending the engine, requests, counters, results."""
