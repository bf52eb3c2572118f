"""The program behind ``scripts/``: prepares data, trains, evaluates and reports.

``python -m fairseq_powernorm.experiments`` lists its commands. They need a checkout of the repository, with ``configs/``.
Nothing in the rest of the package imports this one.
"""
