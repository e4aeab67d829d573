# SPDX-License-Identifier: GPL-2.0
"""Sphinx configuration: `make docs`; every warning is an error."""

project = "pmskb"
author = "pmskb developers"
extensions = []
highlight_language = "c"
html_theme = "alabaster"
exclude_patterns = ["_build"]
