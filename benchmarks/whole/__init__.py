"""Whole procedures against the published ones written plainly: a file each, with ``run``.

``ovseg bench --whole NAME`` finds them by the names of their files.
"""
