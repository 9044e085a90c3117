"""Datasets: rows checked, bytes stored, and made ready for jobs."""
