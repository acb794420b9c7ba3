"""Benchmarks of the operators: a registry of op x shape x baseline, and a runner.

Installed as ``ovseg_benchmarks``.
"""
