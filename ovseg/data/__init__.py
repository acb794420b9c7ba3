"""Data: pictures, label sets, benchmarks, pairs and scenes; sources, loader and transforms."""
