"""Preparation of the data sets, and batches of their tokens; see README.md beside this file."""
