"""All names of the package; importing this makes them known to laplace-torch's `Laplace`."""

from laplace_lora.curvature.backends import LoraEF as LoraEF
from laplace_lora.curvature.backends import LoraGGN as LoraGGN
from laplace_lora.curvature.kron_protocol import LowRankKron as LowRankKron
from laplace_lora.curvature.kron_protocol import LowRankKronDecomposed as LowRankKronDecomposed
from laplace_lora.models.logits_model import LogitsModel as LogitsModel
from laplace_lora.posteriors.exact import FullLoraLaplace as FullLoraLaplace
from laplace_lora.posteriors.exact import LowRankLoraLaplace as LowRankLoraLaplace
from laplace_lora.posteriors.factored import DiagLoraLaplace as DiagLoraLaplace
from laplace_lora.posteriors.factored import KronLoraLaplace as KronLoraLaplace
from laplace_lora.posteriors.last_layer import DiagLoraLLLaplace as DiagLoraLLLaplace
from laplace_lora.posteriors.last_layer import FullLoraLLLaplace as FullLoraLLLaplace
from laplace_lora.posteriors.last_layer import KronLoraLLLaplace as KronLoraLLLaplace
from laplace_lora.posteriors.last_layer_gp import FunctionalLoraLLLaplace as FunctionalLoraLLLaplace
from laplace_lora.storage.adapter_start import AdapterStart as AdapterStart
from laplace_lora.storage.adapter_start import start_of as start_of
from laplace_lora.trainer import LaplaceCallback as LaplaceCallback
