"""Running statistics in trainers of other projects: one step of the statistics with each step of the optimizer.

- :mod:`~fairseq_powernorm.integrations.hugging_face`: a callback and a mixin for ``transformers.Trainer``
- :mod:`~fairseq_powernorm.integrations.lightning`: a callback for ``lightning.pytorch.Trainer``
- :mod:`~fairseq_powernorm.integrations.accelerate`: a context for training loops written with ``accelerate``
- :mod:`~fairseq_powernorm.integrations.steps`: what they share, for any other loop

Each loads its package when it is imported; importing this one loads none of them. The extra ``integrations`` installs all.
"""
