"""What a model's layers are, and which of them prompts can skip."""
