"""Sizes that the kernels share with those who call them. Needs nothing, torch neither."""

# Tokens of a chunk. Between chunks a prefill on a GPU passes the state on, and there it can keep one: a checkpoint lies
# a multiple of so many tokens behind the start of a sequence, or at its end.
CHUNK_SIZE = 64
# Tokens of a sequence from which on a prefill on a GPU may cut it into segments, where heads are few; shorter ones run
# through whole. The two kinds are compiled apart.
SEGMENTED_TOKENS = 32 * CHUNK_SIZE
# Streaming multiprocessors of a Hopper GPU.
NUM_SMS = 132
