"""picture: a model to look at, as a page of HTML or an SVG for papers, and two models side by side.

Everything shown is read off the schema's tables of tensors and the diff's canonical form of a model. A page is one file
that needs no network and no script; what opens and closes is the browser's own.
"""

from modelspec.picture.comparison import comparison
from modelspec.picture.figure import figure
from modelspec.picture.page import page

__all__ = ["comparison", "figure", "page"]
