"""Sphinx's settings: python -m sphinx -W docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

import numbaloss

project = "numbaloss"
author = "the numbaloss developers"
copyright = author
release = version = numbaloss.__version__

# numpydoc's docstrings, MyST's pages, pydata's theme: as NumPy, SciPy and scikit-learn have them. The theme
# has light and dark, works on a phone, and brings its fonts and search along.
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "myst_parser",
    "numpydoc",
    "sphinx_copybutton",
    "mathematics",
    "loss_pages",
    "gallery",
]
exclude_patterns = ["_build", "extensions"]
html_theme = "pydata_sphinx_theme"
html_title = "numbaloss"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_theme_options = {
    "show_prev_next": False,
    "navbar_align": "left",
    "header_links_before_dropdown": 9,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "secondary_sidebar_items": ["page-toc"],
    "navigation_with_keys": False,
}
html_sidebars = {page.stem: [] for page in Path(__file__).parent.glob("*.md")}  # only losses have many pages
html_show_sourcelink = False
toc_object_entries_show_parents = "hide"
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = ">>> "
copybutton_only_copy_prompt_lines = False
