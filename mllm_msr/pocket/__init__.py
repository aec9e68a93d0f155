"""The pocket world: a small generated dataset, and a small multimodal model trained for it.

The pipeline runs on it by default, so that the whole method works without downloads and without a
GPU. The dataset has items with drawn images and titles, and users whose tastes are known
(:mod:`mllm_msr.pocket.world`). The pocket model (``model/``) can describe, summarize and compare
these items and nothing else; it was trained on other worlds, from chats called lessons
(:mod:`mllm_msr.pocket.lessons`), and never on the recommendation question.
"""
