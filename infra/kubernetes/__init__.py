"""Base job templates for Prefect work pools of the type `kubernetes`: one template, and the values of each pool."""
