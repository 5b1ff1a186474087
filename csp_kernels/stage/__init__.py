"""Stages of convolutional networks as graphs, what they compute, and programs, how."""
