"""Profiles of what a turn spends its time on."""
