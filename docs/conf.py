"""How Sphinx builds these pages; `python docs/build.py` calls it, and checks what comes out."""

import fastbn

project = "fastbn"
author = "The fastbn developers"
copyright = "the fastbn developers, BSD 3-clause"
version = release = fastbn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = [
    "_build",
    "examples",
    "tutorial",
    "gallery",
    "**sg_execution_times.rst",
]  # sphinx_gallery reads two of them
root_doc = "index"

# Every reference to a name of fastbn must lead somewhere; there is no network here to look for those of others.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!fastbn).*")]

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc says them in words
autodoc_member_order = "bysource"
default_role = "py:obj"  # `batch_norm` in a docstring is a link, `out` is code
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# A public name without a docstring, or with half of one, stops the build. All checks of numpydoc, but for these:
numpydoc_validation_checks = {
    "all",
    "ES01", "EX01", "SA01",  # not each of a class's methods needs more than a line, an example, neighbours;
    #                          tests/test_docs_api.py asks them of every name in fastbn.__all__
    "RT02",  # what is returned has a name: y, dx, dgamma
    "SS05",  # a summary may be a noun phrase, and one that begins with "Gradients" is no verb
}  # fmt: skip
numpydoc_validation_exclude = {
    r"^fastbn\.Saved$",  # nobody calls its constructor, whose parameters are not shown either; its members are checked
    r"^fastbn\.interop\.",  # signatures of other systems, whose own documentation has their parameters
}

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "none"  # a block without a language is a command or what it prints

sphinx_gallery_conf = {
    "examples_dirs": ["tutorial", "gallery"],
    "gallery_dirs": ["generated/tutorial", "generated/gallery"],
    "filename_pattern": r"plot_\w+\.py$",
    "abort_on_example_error": True,
    "capture_repr": (),  # only what is printed
    "remove_config_comments": True,
    "image_srcset": ["2x"],  # sharp on phones
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "write_computation_times": False,
    "min_reported_time": 0,
    "within_subsection_order": "FileNameSortKey",
    "reference_url": {"fastbn": None},
    "backreferences_dir": None,
}


def setup(app):
    """Sphinx calls it."""
    # Made by batch_norm_train and Saved.fixed only.
    own = "fastbn.Saved", "fastbn.interop.mpi.Saved"
    app.connect("autodoc-process-signature", lambda *args: ("", None) if args[2] in own else None)


templates_path = ["_templates"]

html_theme = "pydata_sphinx_theme"
html_title = "fastbn"
html_static_path = ["_static"]
html_css_files = ["fastbn.css"]
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"contributing": [], "changelog": [], "citation": []}  # pages without a section to navigate in
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
