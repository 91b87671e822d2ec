"""Scaling laws: runs in, a law fitted, its uncertainty, a report. numpy and scipy only."""
