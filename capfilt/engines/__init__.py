"""What carries work on shards out: threads of this process, or a cluster."""
