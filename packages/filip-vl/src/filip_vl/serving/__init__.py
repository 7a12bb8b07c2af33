"""A small local page over an index: type words or drop a picture, and see what matched where."""

from filip_vl.serving.app import make_app, serve
from filip_vl.serving.searcher import Searcher

__all__ = ["Searcher", "make_app", "serve"]
