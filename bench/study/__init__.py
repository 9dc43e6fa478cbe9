# SPDX-License-Identifier: BSD-3-Clause
"""The study of docs/forgetting.md: three beds, their runner, statistics and pictures."""
