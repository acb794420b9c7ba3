"""Definitions in plain torch, one operator a file, which every backend is held to."""
