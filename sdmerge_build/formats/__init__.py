"""Owns checkpoints that are not one safetensors file: pickles, shards and diffusers folders, each turned into one.

Has never heard of recipes or addresses; it is given files and makes a file.
"""
