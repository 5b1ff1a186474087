"""tests/ops/test_schemas.py on the device."""

# ruff: noqa: F401

from ops.test_schemas import (
    poisoned_memory,
    test_concat_conv,
    test_csp_stage,
    test_partial_transition,
    test_post_dense_block,
)
