"""Measuring models: data sets, protocols, metrics, reports."""
