"""Training: composes a run's configuration, starts it on one or several ranks, follows it and shows how it is doing."""
