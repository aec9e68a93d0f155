"""The embedded world and its small multimodal model: the method without a model hub."""
