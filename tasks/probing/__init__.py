"""Probes: questions with known answers, asked of the base and of the result in the engine, and compared in pairs.

Three sets: tool calls, answers that must end, and values to be found in a long text.
"""
