"""What the services share, and nothing else."""
