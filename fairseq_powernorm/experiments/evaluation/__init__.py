"""Evaluation of a trained run: translation, BLEU and perplexity."""
