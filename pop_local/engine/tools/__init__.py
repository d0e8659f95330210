"""Tools: how a model is told of them, how it calls them, and its calls read out of an answer."""
