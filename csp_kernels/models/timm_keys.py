"""Weights of timm's CSPNets for the networks here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# timm's name -> the name here, applied one after the other
_RENAME = (
    (r"^stem\.conv1\.", "features.stem."),
    (r"^stages\.(\d+)\.", lambda m: f"features.stage{int(m[1]) + 1}."),
    (r"\.conv_down\.", ".down."),
    (r"\.conv_exp\.", ".split."),
    (r"\.conv_transition_b\.", ".t_a."),
    (r"\.conv_transition\.", ".t_b."),
    (r"\.bn\.", ".norm."),
    (r"^head\.fc\.", "classifier."),
)


def from_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of timm's cspresnet50, cspresnext50 or cspdarknet53 under the names used here.

    For csp_resnet50, csp_resnext50 and csp_darknet53 with variant="timm"; the same tensors, nothing copied.

        model = csp.models.csp_darknet53(variant="timm")
        model.load_state_dict(from_timm(timm.create_model("cspdarknet53", pretrained=True).state_dict()))
    """
    renamed = {}
    for key, value in state_dict.items():
        for pattern, name in _RENAME:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed
