"""Recipes: the models that validate them, and how a YAML file becomes one."""
