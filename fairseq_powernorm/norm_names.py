"""The norms by name, and the classes behind the names. Imports nothing, so that scripts know the names without torch."""

#: name on the command line and in YAML files -> MODULE.CLASS in :mod:`fairseq_powernorm.norms`
NORM_CLASSES = {
    "layer": "layer.LayerNorm",
    "rms": "layer.RMSNorm",
    "batch": "batch.MaskedBatchNorm",
    "power-v": "power_v.PowerNormV",
    "power": "power.PowerNorm",
    "batch-renorm": "batch_renorm.BatchRenorm",
    "mabn": "window.MovingAverageBatchNorm",
    "un": "window.UnifiedNorm",
    "rbn": "regularized.RegularizedBatchNorm",
    "prepbn": "progressive.ProgressiveBatchNorm",
    "group-scale": "group.GroupScaleNorm",
    "scale": "scale.ScaleNorm",
    "ada": "ada.AdaNorm",
    "group": "group.GroupNorm",
    "dyt": "pointwise.DynamicTanh",
    "derf": "pointwise.DynamicErf",
}
