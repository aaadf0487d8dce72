"""Benchmarks: speed.py and learning.py are the commands, the other files are theirs."""
