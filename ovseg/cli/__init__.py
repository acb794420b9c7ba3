"""The command line: one verb a file, which parses and calls."""
