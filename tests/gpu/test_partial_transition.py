"""tests/ops/test_partial_transition.py on the device: what does not speak of the C++ operators."""

# ruff: noqa: F401

from ops.test_partial_transition import (
    test_empty_batch,
    test_equals_the_transition_of_densenet,
    test_expanded,
    test_frozen_norms,
    test_fusion_last_leaves_the_bypass_alone,
    test_gradcheck,
    test_gradcheck_without_bypass,
    test_gradient_of_one_input_alone,
    test_inference,
    test_large_mean,
    test_layouts,
    test_norms_without_affine_parameters,
    test_one_epsilon_a_norm,
    test_one_value_per_channel_with_running_statistics,
    test_parameters_in_the_storage_dtype,
    test_part_and_dense_are_slices_of_one_tensor,
    test_repeats_bitwise,
    test_shapes,
    test_training,
)
