"""Texts to calibrate and to measure on: where they come from, their rows, chats through a chat template."""
