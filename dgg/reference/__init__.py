# SPDX-License-Identifier: BSD-3-Clause
r"""The update in plain PyTorch: specification, fallback and oracle in one.

Equations, numbered as in the README (θ parameter, g gradient, r replay gradient, θ* anchor,
F importance):

    (1)  h = g + w r
    (2)  c = min(1, max_grad_norm / (‖h‖ + 1e-6)),  1 without clipping
    (3)  u = ((1 - i) + i F) ∘ (θ - θ*),  i the option ``importance``; θ - θ* where i = 0
    (4)  s = strength · min(1, c ‖g‖ / ‖u‖),  0 when ‖g‖ or ‖u‖ is 0 or not finite;
         strength without scaling
    (5)  G = c h + b s u,  b ~ Bernoulli(α)
    (6)  Adam, AdamW or SGD applied to G
    (7)  with ``alpha="auto"``, in place of b s:
         strength · min(-c ⟨h, r⟩ / ⟨u, r⟩, c ‖h‖ / ‖u‖) where ⟨h, r⟩ < 0 < ⟨u, r⟩, else 0

(7) is the shortest pull after which the step no longer raises the loss of the replayed examples, to
first order: ⟨G, r⟩ = 0. ``route`` says where the pull of (5) enters: in G, and so in both moments
(``"gradient"``, the paper's); in the first moment alone (``"first_moment"``); or outside of the
moments, as decoupled weight decay does (``"decoupled"``): θ ← θ - lr b s u.

Every backend computes these and nothing else, has these functions' signatures, and is tested
against them. Arithmetic is float32 whatever the storage type (float64 parameters: float64);
tensors promoted to float64 therefore make this package the oracle. A ``None`` in a list means
absent; a row with neither grad nor replay is untouched and counts in no norm.

Li et al., "Multimodal Continual Instruction Tuning with Dynamic Gradient Guidance",
arXiv 2511.15164. Importance from Adam's second moment: Li et al., "Fishers for Free?",
arXiv 2507.18807.
"""

from dgg.reference.measures import (
    CLIP,
    DISTANCE,
    FLOAT_DTYPES,
    GRAD_NORM,
    GUARD_EXTRAS,
    GUIDED,
    H_DOT_R,
    NORM_DISTANCE,
    NORM_GRAD,
    NORM_TOTAL,
    PRODUCTS,
    PULL,
    REPLAY,
    SCALES,
    TOTAL,
    TOTAL_NORM,
    U_DOT_R,
    TensorList,
    coefficients,
    compute_dtype,
    distance,
    gradients,
    guard_coefficients,
    norms,
    products,
    weighted_difference,
)
from dgg.reference.updates import (
    FIRST_STEP,
    INJECT,
    INJECT_ELEMENTS,
    ROUTES,
    adam_,
    adopted,
    guide_,
    guided_gradient,
    sgd_,
    store,
)

__all__ = [
    "CLIP", "DISTANCE", "FIRST_STEP", "FLOAT_DTYPES", "GRAD_NORM", "GUARD_EXTRAS", "GUIDED",
    "H_DOT_R", "INJECT", "INJECT_ELEMENTS", "NORM_DISTANCE", "NORM_GRAD", "NORM_TOTAL", "PRODUCTS",
    "PULL", "REPLAY", "ROUTES", "SCALES", "TOTAL", "TOTAL_NORM", "TensorList", "U_DOT_R", "adam_",
    "adopted", "coefficients", "compute_dtype", "distance", "gradients", "guard_coefficients",
    "guide_", "guided_gradient", "norms", "products", "sgd_", "store", "weighted_difference",
]  # fmt: skip
