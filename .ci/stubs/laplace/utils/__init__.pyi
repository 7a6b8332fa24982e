from laplace.utils.matrix import Kron as Kron
from laplace.utils.matrix import KronDecomposed as KronDecomposed
