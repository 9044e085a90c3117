"""Trainers: each leases a job, runs it in a process group of its own, and reports."""
