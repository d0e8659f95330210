"""The layers of a model, and which of them prompts can skip."""
