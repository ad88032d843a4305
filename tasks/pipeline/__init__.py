"""What all stages share: reuse by stage key, the lease, the record of a result, and how Prefect runs them."""
