"""ScaleNorm, as CONTRIBUTING.md shows it; test_row_norms.py holds it to more."""
import torch

from fairseq_powernorm.norms import build_norm


def test_rows_have_length_root_of_dim():
    """A new ScaleNorm gives every row the length sqrt(C), but for those that are shorter than eps."""
    x = torch.randn(5, 3, 16)
    x[0, 0] = 0.0
    y = build_norm("scale:eps=0.001", 16)(x)
    lengths = torch.full((5, 3), 4.0)
    lengths[0, 0] = 0.0
    torch.testing.assert_close(y.norm(dim=-1), lengths)
