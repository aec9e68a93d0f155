"""The method of the paper: prompts, item summaries, user preferences, examples, scores."""
