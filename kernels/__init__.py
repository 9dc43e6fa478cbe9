# SPDX-License-Identifier: BSD-3-Clause
"""Triton kernels, installed as ``dgg.kernels``.

The folder is a package of its own, and this file stays, because an editable install maps
``dgg.kernels`` to it. The kernels themselves arrive here.
"""
