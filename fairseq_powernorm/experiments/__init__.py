"""The experiments: data, training, evaluation, reports, and a cluster to run them on.

A module here that can be called, such as ``python -m fairseq_powernorm.experiments.train``, is a command, and its work is
done by one of a folder; ``scripts/*.sh`` call them in an environment that has everything. They need a checkout of the
repository, with ``configs/``.
"""
