"""``translation_pn``: fairseq's translation task for models with running statistics."""
import os

from fairseq import utils
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask


@register_task("translation_pn", dataclass=TranslationConfig)
class TranslationPNTask(TranslationTask):
    """Translation, BLEU during validation (``--eval-bleu``, by sacreBLEU) included.

    Raises:
        ValueError: the data directory is missing or holds no dictionaries
    """

    @classmethod
    def setup_task(cls, cfg: TranslationConfig, **kwargs):
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
        if dataset is not self.datasets.get(self.cfg.train_subset):
            required_batch_size_multiple = 1
        return super().get_batch_iterator(
            dataset, *args, required_batch_size_multiple=required_batch_size_multiple, **kwargs
        )
