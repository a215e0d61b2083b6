"""First contact for a run, and a whole swarm as local processes."""
