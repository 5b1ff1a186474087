"""tests/ops/test_concat_conv.py on the device: what does not speak of the C++ operators."""

# ruff: noqa: F401

from ops.test_concat_conv import (
    test_activations,
    test_empty_batch,
    test_epsilon,
    test_expanded,
    test_gradcheck,
    test_gradient_of_one_input_or_output_alone,
    test_inference,
    test_inputs_of_different_layouts_and_slices_of_one_tensor,
    test_large_mean,
    test_layouts,
    test_norm_without_affine_parameters,
    test_one_value_per_channel_with_running_statistics,
    test_parameters_in_the_storage_dtype,
    test_repeats_bitwise,
    test_training,
)
