# SPDX-License-Identifier: BSD-3-Clause
"""MiniVQA: continual multimodal instruction tuning at a size two CPU cores can carry."""
