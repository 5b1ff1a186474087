"""Networks built from the fused layers: plain ones and their cross stage partial forms; necks in `models.necks`."""

from csp_kernels.models import necks, timm_keys
from csp_kernels.models.darknet import csp_darknet53, darknet53
from csp_kernels.models.densenet import (
    csp_densenet121,
    csp_densenet161,
    csp_densenet169,
    csp_densenet201,
    csp_densenet_digits,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet_digits,
)
from csp_kernels.models.network import Features, Network
from csp_kernels.models.peleenet import csp_peleenet, csp_peleenet_digits, peleenet, peleenet_digits
from csp_kernels.models.resnet import csp_resnet10, csp_resnet50, csp_resnext50, resnet10, resnet50, resnext50

__all__ = [
    "Features",
    "Network",
    "csp_darknet53",
    "csp_densenet121",
    "csp_densenet161",
    "csp_densenet169",
    "csp_densenet201",
    "csp_densenet_digits",
    "csp_peleenet",
    "csp_peleenet_digits",
    "csp_resnet10",
    "csp_resnet50",
    "csp_resnext50",
    "darknet53",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet_digits",
    "necks",
    "peleenet",
    "peleenet_digits",
    "resnet10",
    "resnet50",
    "resnext50",
    "timm_keys",
]
