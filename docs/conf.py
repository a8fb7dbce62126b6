"""The pages as HTML: ``make docs``."""

import fastlstm

project = "fastlstm"
author = "the fastlstm authors"
version = release = fastlstm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # of links to files beside the pages: tests/test_docs.py
intersphinx_mapping: dict[str, tuple[str, None]] = {}  # builds without a network

html_theme = "furo"
html_title = "fastlstm"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say it with shapes
napoleon_google_docstring = True
napoleon_use_rtype = False
