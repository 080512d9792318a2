"""Tina's jobs: what `ray job submit -- python -m ray_jobs.NAME` runs."""
