# SPDX-License-Identifier: BSD-3-Clause
"""One step of an optimizer: decide, take the gradients, measure, apply. Begin with `run`."""
