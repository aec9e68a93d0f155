"""Commands beside the stages of the pipeline."""
