# SPDX-License-Identifier: BSD-3-Clause
"""Numbers that Python and the kernels agree on; csrc/table.h has the same and says what they mean.

Here they stand once for Python and for Triton, there once for C++ and CUDA, and
tests/test_table_layout.py compares the two. Nothing is imported here, so that a table can be packed
without Triton.
"""

# Columns of the address table.
PARAM = 0
EXP_AVG = 1
EXP_AVG_SQ = 2
MAX_EXP_AVG_SQ = 3
ANCHOR = 4
STEP = 5
NUMEL = 6
GROUP = 7
DTYPES = 8
INDEX = 9
BASE = 10
STRETCH = 11
STRIDE = 12
COPY = 13
IMPORTANCE = 14
COLUMNS = 15

# Dtypes in the order of their codes, and the places of the codes within the dtype column.
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
SLOT_BITS = 4
SLOT_MASK = 0xF
PARAM_SLOT = 0
GRAD_SLOT = 1
REPLAY_SLOT = 2
EXP_AVG_SLOT = 3
EXP_AVG_SQ_SLOT = 4
MAX_EXP_AVG_SQ_SLOT = 5
ANCHOR_SLOT = 6
COPY_SLOT = 7
IMPORTANCE_SLOT = 8
SLOTS = 9

# Columns of the hyper-parameters, a row per group.
ADAM_HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "amsgrad", "maximize",
              "strength", "threshold")  # fmt: skip
SGD_HYPER = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "strength",
             "threshold")  # fmt: skip
GUIDE_HYPER = ("maximize", "strength", "threshold")

# Bits of `variant`: what a launch has to be compiled for.
ANCHOR_BIT = 1
ELEMENTS_BIT = 2
LOOK_AHEAD_BIT = 4
STATE_BIT = 8
STOCHASTIC_BIT = 16
COPY_BIT = 32
IMPORTANCE_BIT = 64
FIRST_MOMENT_BIT = 128
DECOUPLED_BIT = 256

# Where the pull enters.
BY_GRADIENT = 0
BY_FIRST_MOMENT = 1
BY_DECOUPLED = 2
ROUTES = {"gradient": BY_GRADIENT, "first_moment": BY_FIRST_MOMENT, "decoupled": BY_DECOUPLED}

# What a draw decides.
BY_STEP = 0
BY_TENSOR = 1
BY_ELEMENT = 2
GRANULARITIES = {"step": BY_STEP, "tensor": BY_TENSOR, "element": BY_ELEMENT}

# Elements of a chunk. A launch has a block per chunk, and sums are formed chunk by chunk in a fixed
# order, so results do not depend on how blocks are scheduled.
CHUNK = 8192

# Bits of `flags`, one byte for each row.
INJECT = 1
INJECT_ELEMENTS = 2
FIRST_STEP = 4

# Bits of `which`: the norms that are asked for.
NORM_TOTAL = 1
NORM_GRAD = 2
NORM_DISTANCE = 4

# Places in `coefficients`; from SCALES on there is one for each row.
CLIP = 0
GRAD_LENGTH = 1
DISTANCE_LENGTH = 2
TOTAL_LENGTH = 3
SCALES = 4

# Rows of `products`: of all tensors ||h||^2, then of the guided ones ||h||^2, ||u||^2, ||r||^2,
# <h, r> and <u, r>.
TOTAL = 0
GUIDED = 1
PULL = 2
REPLAY = 3
H_DOT_R = 4
U_DOT_R = 5
PRODUCTS = 6
# Partial sums of a chunk at most: those of `products` but for the first.
PARTIALS = 5
# Behind the scales of a guarded step: its alignment and its pull.
GUARD_EXTRAS = 2

# Word 3 of a Philox counter; a tensor's stream is this plus its index.
STREAM_STEP = 0
STREAM_TENSOR = 1
STREAM_ELEMENT = 0x80000000
STREAM_ROUNDING = 0xC0000000
