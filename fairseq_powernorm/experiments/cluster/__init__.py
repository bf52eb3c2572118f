"""Runs on a cluster with SLURM."""
