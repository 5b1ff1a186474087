"""tests/ops/test_post_dense_block.py on the device: what does not speak of the C++ operators."""

# ruff: noqa: F401

from ops.test_post_dense_block import (
    test_first_channels_are_the_input,
    test_frozen_norms,
    test_gradcheck,
    test_inference,
    test_large_mean,
    test_layouts,
    test_repeats_bitwise,
    test_training,
)
