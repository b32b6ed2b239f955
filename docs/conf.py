"Sphinx's configuration; the pages are put together by build.py."

import re

project, author, copyright = "tfbench", "The tfbench developers", "The tfbench developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
root_doc = "nbs/index"
html_theme, html_title = "sphinx_book_theme", "tfbench"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "navbar_persistent": [],
}
html_static_path, html_css_files = ["static"], ["site.css"]
html_copy_source = html_show_sourcelink = html_use_index = html_domain_indices = False
templates_path, exclude_patterns = [], []

nb_execution_mode = "off"  # committed outputs are shown as they are
nb_merge_streams = True
nb_render_markdown_format = "myst"  # outputs have tables and formulas
nb_mime_priority_overrides = [
    ("html", "text/markdown", 5),
    ("html", "application/vnd.tfbench.claims+json", None),
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = [
    "mystnb.unknown_mime_type",
    "mystnb.lexer",
    "misc.highlighting_failure",
    "myst.header",
]
autodoc_member_order, autodoc_typehints, add_module_names = "bysource", "none", False
default_role, autodoc_inherit_docstrings = "code", False


def literal(text: str) -> str:
    "A docstring or comment as it is meant: `code` is code, everything else plain text."
    parts = re.split(r"(`[^`]+`)", " ".join(str(text).split()))
    return "".join(
        f"`{p}`"
        if p.startswith("`") and p.endswith("`") and len(p) > 2
        else re.sub(r"([*|_\\])", r"\\\1", p)
        for p in parts
    )


def parameters_from_comments(app, what, name, obj, options, lines):
    "The comments behind a signature's parameters become a list under the docstring."
    from fastcore.docments import docments

    lines[:] = [literal(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    try:
        found = docments(obj, returns=True, full=False)
    except Exception:
        return  # builtins and generated methods have no source
    told = [
        f"- **{n}**: {literal(text)}"
        for n, text in found.items()
        if text and n not in ("self", "return")
    ]
    if found.get("return"):
        told.append(f"- *returns* {literal(found['return'])}")
    if told:
        lines += ["", *told, ""]


def setup(app):
    app.connect("autodoc-process-docstring", parameters_from_comments)
