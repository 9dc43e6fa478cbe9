# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints: nothing of an optimizer's state is lost, cast or left out without an error."""
