"""tests/ops/test_csp_stage.py on the device: what does not speak of the C++ operators."""

# ruff: noqa: F401

from ops.test_csp_stage import (
    test_dense_gradients_do_not_see_the_bypass,
    test_dense_gradients_do_not_see_the_bypass_but_through_the_mask,
    test_dense_path_does_not_see_the_bypass,
    test_empty_batch,
    test_equals_block_and_transition,
    test_expanded,
    test_frozen_norms,
    test_gradcheck,
    test_gradient_of_u_needs_the_bypass_and_x_t_only,
    test_inference,
    test_large_mean,
    test_layouts,
    test_no_gradient_crosses_between_the_sides,
    test_norms_without_affine_parameters,
    test_one_epsilon_a_norm,
    test_one_value_per_channel_with_running_statistics,
    test_parameters_in_the_storage_dtype,
    test_recompute,
    test_repeats_bitwise,
    test_shapes,
    test_training,
)
