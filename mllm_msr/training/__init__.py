"""Supervised fine-tuning of the recommender with LoRA (paper, section Method, step 3)."""
