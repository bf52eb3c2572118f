"""From archives to binarized data: corpora, tokenization, BPE, and the artificial corpus of the demo."""
