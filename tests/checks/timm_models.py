"""Models of timm with norms of this package; run by timm.sh, in an environment that has timm."""
import argparse
import copy
import datetime
import platform
import sys

import timm
import torch
import torchvision

from fairseq_powernorm.convert import replace_norms
from fairseq_powernorm.fold import FoldedNorm, fold_norms
from fairseq_powernorm.norms import RunningNorm
from fairseq_powernorm.statistics import RunningStatistics

SIZES = dict(embed_dim=32, depth=2, num_heads=4)
#: model -> settings that make it small, input size
MODELS = {
    "vit_tiny_patch16_224": (dict(img_size=32, patch_size=8, **SIZES), 32),
    "vit_base_patch16_clip_224": (dict(img_size=32, patch_size=8, **SIZES), 32),
    "deit3_small_patch16_224": (dict(img_size=32, patch_size=8, **SIZES), 32),
    "eva02_tiny_patch14_224": (dict(img_size=32, patch_size=8, **SIZES), 32),
    "swin_tiny_patch4_window7_224": (dict(img_size=56, embed_dim=16, depths=(1, 1), num_heads=(2, 4)), 56),
    "convnext_atto": (dict(depths=(1, 1, 1, 1), dims=(16, 32, 32, 32)), 64),
}


def randomized(model):
    """Parameters and statistics of norms as training leaves them."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in model.state_dict().items():
            if each.dim() == 1 and not name.endswith("iters"):
                each.add_(torch.rand(each.shape, generator=draw) * 0.5)
    return model


@torch.no_grad()
def logits(model, x):
    return model.eval()(x)


def check(name):
    """One model; returns a row of the record. AssertionError if something does not hold."""
    settings, size = MODELS[name]
    torch.manual_seed(0)
    stock = randomized(timm.create_model(name, pretrained=False, num_classes=10, **settings))
    images = torch.randn(2, 3, size, size)
    expected = logits(stock, images)
    same, report = replace_norms(copy.deepcopy(stock), "layer")
    same = float((logits(same, images) - expected).abs().max())
    assert same <= 1e-5 * max(1.0, float(expected.abs().max())), same
    model, report = replace_norms(copy.deepcopy(stock), "power:variant=algorithm2")
    left = [each for each in report.left if "attention heads" not in each.reason]
    assert not left, left
    layouts = sorted({norm.layout for norm in model.modules() if isinstance(norm, RunningNorm)})
    statistics = RunningStatistics(model.train())
    for _ in range(2):
        with statistics.batch():
            model(torch.randn(2, 3, size, size)).square().mean().backward()
        statistics.commit()
    assert all(float(norm.iters) == 2 for norm in model.modules() if isinstance(norm, RunningNorm))
    assert all(bool(torch.isfinite(each.grad).all()) for each in model.parameters() if each.grad is not None)
    expected = logits(model, images)
    folded = fold_norms(copy.deepcopy(model))
    difference = float((logits(folded, images) - expected).abs().max())
    assert difference <= 1e-5 * max(1.0, float(expected.abs().max())), difference
    bare = sum(each.scale is None for each in folded.modules() if isinstance(each, FoldedNorm))
    return name, len(report.replaced), ", ".join(layouts), f"{same:.1e}", f"{difference:.1e}", bare


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args()
    rows, failed = [], 0
    for name in MODELS:
        try:
            rows.append(check(name))
            print(*rows[-1], flush=True)
        except Exception as error:
            failed += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
    if failed:
        return 1
    head = ("model", "norms", "layouts", "LayerNorm by LayerNorm", "folded", "folded into linear maps")
    lines = [head, ("---",) * len(head), *rows]
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    if options.record:
        with open(options.record, "x", encoding="utf-8") as stream:
            stream.write(
                f"# tests/checks/timm.sh\n\n{datetime.date.today()}, {versions}, Python {platform.python_version()}. "
                f"Small models of timm with random weights; differences are the largest of a logit.\n\n{text}\n"
            )
    print("all held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
