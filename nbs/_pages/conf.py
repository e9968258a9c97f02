"""How Sphinx makes the pages. Nothing in them may ask another host."""

from nbdev.config import get_config

project = title = html_title = get_config().title
copyright, author, release = get_config().copyright, get_config().author, get_config().version

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_render_markdown_format = "myst"  # tables among the outputs
suppress_warnings = ["mystnb.unknown_mime_type"]  # what programs read, such as a conclusion's facts, is not shown
nb_code_prompt_show, nb_code_prompt_hide = "What the lessons share", "What the lessons share"
myst_enable_extensions = ["dollarmath", "linkify"]
myst_linkify_fuzzy_links = False
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_css_files = ["srsys.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "show_toc_level": 2}
pygments_style = "default"
