"""Load, prove, switch, count, stream: all that touches llama_cpp, and nothing that draws."""
