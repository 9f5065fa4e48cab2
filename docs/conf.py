"""Sphinx's configuration of the documentation. tools/docs_build.py copies it beside the pages."""

project = "vksteer"
author = "vksteer developers"
extensions = ["myst_parser"]
exclude_patterns = []
nitpicky = True

# Anchors as GitHub makes them, so that links work on both.
myst_heading_anchors = 4
myst_enable_extensions = ["tasklist"]

html_theme = "furo"
html_title = "vksteer"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False}
pygments_style = "friendly"
pygments_dark_style = "monokai"
