"""Stages of convolutional networks as graphs: what they compute, checked and printed."""
