"""tests/ops/test_dense_block.py on the device: what does not speak of the C++ operators."""

# ruff: noqa: F401

from ops.test_dense_block import (
    test_channels_last_weights,
    test_dropout_differs_between_calls_channels_layers_and_pixels,
    test_dropout_keeps_its_fraction,
    test_dropout_mask_is_the_same_in_backward,
    test_empty_batch,
    test_expanded_input_and_gradient,
    test_first_channels_are_the_input,
    test_frozen_norms,
    test_gradcheck,
    test_gradient_of_the_input_alone_and_of_one_parameter,
    test_gradients_without_kinks,
    test_inference,
    test_input_layout,
    test_large_mean,
    test_norms_without_affine_parameters,
    test_one_channel,
    test_one_epsilon_a_norm,
    test_opcheck_backward,
    test_opcheck_forward,
    test_opcheck_inference,
    test_parameters_in_the_storage_dtype,
    test_recompute,
    test_repeats_bitwise,
    test_single_channel_keeps_the_memory_format,
    test_statistics_describe_the_output,
    test_training,
)
