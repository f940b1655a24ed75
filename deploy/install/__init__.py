"""`make install`: the environment in .venv, for a GPU or for a CPU.

Only the standard library is used: this runs before anything is installed.
"""
