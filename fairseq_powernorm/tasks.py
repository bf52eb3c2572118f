"""``translation_pn`` and ``language_modeling_pn``: fairseq's tasks for models with running statistics."""
import os
from dataclasses import dataclass

from fairseq import utils
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II


class PowerNormTask:
    """Mixin, before a task class of fairseq: what the tasks of this package have in common.

    Raises:
        ValueError: the data directory is missing or holds no dictionaries
    """

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        """Check the data directories, then set up fairseq's task."""
        for path in utils.split_paths(cfg.data or ""):
            if not os.path.isdir(path):
                raise ValueError(f"data {path!r}: not a directory; must be one written by fairseq-preprocess")
        return super().setup_task(cfg, **kwargs)

    def get_batch_iterator(self, dataset, *args, required_batch_size_multiple=1, **kwargs):
        """As in fairseq, but outside training no sentence is left out.

        fairseq drops a last batch whose size is not a multiple of ``--required-batch-size-multiple`` (8 by
        default), in validation and generation too.
        """
        options = self.args if self.cfg is None else self.cfg  # fairseq's older tasks have the former
        if dataset is not self.datasets.get(options.train_subset):
            required_batch_size_multiple = 1
        return super().get_batch_iterator(
            dataset, *args, required_batch_size_multiple=required_batch_size_multiple, **kwargs
        )


@register_task("translation_pn", dataclass=TranslationConfig)
class TranslationPNTask(PowerNormTask, TranslationTask):
    """Translation, BLEU during validation (``--eval-bleu``, by sacreBLEU) included."""


@dataclass
class LanguageModelingPNConfig(LanguageModelingConfig):
    """fairseq's options, and which data set is the one for training."""

    train_subset: str = II("dataset.train_subset")


@register_task("language_modeling_pn", dataclass=LanguageModelingPNConfig)
class LanguageModelingPNTask(PowerNormTask, LanguageModelingTask):
    """Language modelling on blocks of ``--tokens-per-sample`` tokens; sampling by ``fairseq-interactive``."""

    def eval_lm_dataloader(self, dataset, *args, max_positions=None, **kwargs):
        """As in fairseq, which would leave out blocks that are longer than the model allows.

        Raises:
            ValueError: there is such a block
        """
        longest = int(max(dataset.sizes))
        if max_positions is not None and longest > max_positions:
            raise ValueError(
                f"--tokens-per-sample {self.args.tokens_per_sample}: a block of {longest} tokens is longer than the "
                f"{max_positions} that the model allows"
            )
        return super().eval_lm_dataloader(dataset, *args, max_positions=max_positions, **kwargs)
