"""Recipes: the model that validates them, and how a YAML file becomes one."""
