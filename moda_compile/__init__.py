"""Mixture-of-Depths Attention (arXiv 2603.15619) for existing transformers, by graph rewriting."""

from pathlib import Path as _Path

if __name__ != "moda_compile":  # else the operators would be registered twice
    raise ImportError(f"moda_compile must be imported by that name, not as {__name__!r}.")
_root = _Path(__file__).resolve().parent
if not (_root / "kernels").is_dir():  # a checkout keeps kernels/ and patterns/ beside the package
    __path__.append(str(_root.parent))

from moda_compile.attention import moda_attention
from moda_compile.backend import Backend
from moda_compile.checkpoint import load, saved_config
from moda_compile.config import MoDAConfig
from moda_compile.convert import convert, explain, revert
from moda_compile.errors import InputError, MoDAError, NotRewrittenError, RewriteError
from moda_compile.patterns.registry import register_pattern
from moda_compile.report import AttentionReport, Report

__version__ = "0.1.0"
__all__ = [
    "AttentionReport",
    "Backend",
    "InputError",
    "MoDAConfig",
    "MoDAError",
    "NotRewrittenError",
    "Report",
    "RewriteError",
    "convert",
    "explain",
    "load",
    "moda_attention",
    "register_pattern",
    "revert",
    "saved_config",
]
