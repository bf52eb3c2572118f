"""The claims of jobs, by their former name."""

from .claims import jobs_of, read_claim  # noqa: F401
