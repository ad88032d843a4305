"""Repairs of repos on the Hub, proposed as pull requests."""
