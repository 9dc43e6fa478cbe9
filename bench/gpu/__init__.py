# SPDX-License-Identifier: BSD-3-Clause
"""Everything for a machine with a GPU: the command that survives a broken kernel, and its parts."""
