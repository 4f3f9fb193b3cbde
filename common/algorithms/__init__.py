"""The closed registry of algorithms.

An algorithm never sees an image: it gets parameters and private queries and returns an update. So it cannot
leak by mistake, and its file reads like the paper.
"""

from common.algorithms import fedavg, fedprox, fomaml, local_only, reptile
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries

ALGORITHMS: dict[str, Algorithm] = {
    "reptile": reptile.ALGORITHM,
    "fomaml": fomaml.ALGORITHM,
    "fedavg": fedavg.ALGORITHM,
    "fedprox": fedprox.ALGORITHM,
    "local_only": local_only.ALGORITHM,
}

__all__ = ["ALGORITHMS", "Algorithm", "LocalUpdate", "PrivateQueries"]
