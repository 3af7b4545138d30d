"""Counting and measuring what training costs: memory, FLOPs, time."""
