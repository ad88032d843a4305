"""Base job templates of Prefect work pools of the type `kubernetes`, made from one job and the values of each pool."""
