"""Limits of the numbers that llama.cpp accepts."""

# llama.cpp's counts have 32 bits.
MOST = 2**31 - 1
MOST_GIB = 2**20
MOST_THREADS = 512  # ggml.h's GGML_MAX_N_THREADS; with more, llama.cpp aborts
# The next larger number makes llama.cpp choose a random seed.
MOST_SEED = 2**32 - 2
