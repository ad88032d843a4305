"""Common parts of all stages: reuse by stage key, the lease, the record of a result, and Prefect's tasks."""
