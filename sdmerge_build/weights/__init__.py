"""Owns weights: what a recipe says of a ratio, by block, depth, name of a preset, element or glob, down to one number per tensor.

Has never heard of methods or files.
"""
