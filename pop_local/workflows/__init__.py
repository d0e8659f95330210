"""What the commands do, as library calls: convert, evaluate, analyze, and what they share."""
