# SPDX-License-Identifier: BSD-3-Clause
"""Methods that guidance is compared with, one file each, behind one interface (see base.py)."""

from methods.agem import AGEM
from methods.base import Method
from methods.coso import CoSO
from methods.doc import DOC
from methods.ewc import EWC
from methods.extrapolation import Extrapolation
from methods.gradient_dropout import GradientDropout
from methods.grads import GrADS
from methods.l2sp import L2SP
from methods.loki import LoKI
from methods.neuron_fusion import NeuronFusion
from methods.online_ewc import OnlineEWC
from methods.pegp import PEGP
from methods.perturb_and_merge import PerturbAndMerge
from methods.powerpropagation import Powerpropagation
from methods.recadam import RecAdam
from methods.sgp import SGP
from methods.spd import SPD

METHODS: dict[str, type[Method]] = {
    "l2sp": L2SP,
    "recadam": RecAdam,
    "ewc": EWC,
    "online_ewc": OnlineEWC,
    "agem": AGEM,
    "spd": SPD,
    "sgp": SGP,
    "pegp": PEGP,
    "doc": DOC,
    "coso": CoSO,
    "perturb_and_merge": PerturbAndMerge,
    "neuron_fusion": NeuronFusion,
    "gradient_dropout": GradientDropout,
    "powerpropagation": Powerpropagation,
    "loki": LoKI,
    "grads": GrADS,
    "extrapolation": Extrapolation,
}

__all__ = ["METHODS", "Method"]
