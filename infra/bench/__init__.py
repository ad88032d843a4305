"""Benchmarks: figures for people, never assertions in tests."""
