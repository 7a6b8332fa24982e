# What laplace_lora uses of laplace-torch 0.3, typed by what the code does: its own annotations are
# partial, and some say less (`**kwargs: dict[str, Any]`, `list[tuple[Tensor]]` for lists of lists).
# Keyword arguments that are only handed on to a model are left out; laplace_lora passes none.
from laplace.baselaplace import BaseLaplace as BaseLaplace
from laplace.baselaplace import DiagLaplace as DiagLaplace
from laplace.baselaplace import FullLaplace as FullLaplace
from laplace.baselaplace import FunctionalLaplace as FunctionalLaplace
from laplace.baselaplace import KronLaplace as KronLaplace
from laplace.baselaplace import ParametricLaplace as ParametricLaplace
from laplace.laplace import Laplace as Laplace
from laplace.lllaplace import DiagLLLaplace as DiagLLLaplace
from laplace.lllaplace import FullLLLaplace as FullLLLaplace
from laplace.lllaplace import FunctionalLLLaplace as FunctionalLLLaplace
from laplace.lllaplace import KronLLLaplace as KronLLLaplace
from laplace.lllaplace import LLLaplace as LLLaplace
