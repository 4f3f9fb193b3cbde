"""The closed registry of algorithms.

An algorithm never sees an image: it gets parameters and private queries and returns an update. So it cannot
leak by mistake, and its file reads like the paper.
"""

from common.algorithms import (
    anil,
    fedavg,
    fedprox,
    fomaml,
    local_only,
    maml,
    mapping,
    metasgd,
    mrmtl,
    protonet,
    prototypes,
    reptile,
    transfer,
)
from common.algorithms.interface import Algorithm, ClassSums, LocalUpdate, PrivateQueries

ALGORITHMS: dict[str, Algorithm] = {
    "reptile": reptile.ALGORITHM,
    "fomaml": fomaml.ALGORITHM,
    "maml": maml.ALGORITHM,
    "anil": anil.ALGORITHM,
    "metasgd": metasgd.ALGORITHM,
    "protonet": protonet.ALGORITHM,
    "prototypes": prototypes.ALGORITHM,
    "mapping": mapping.ALGORITHM,
    "fedavg": fedavg.ALGORITHM,
    "fedprox": fedprox.ALGORITHM,
    "mrmtl": mrmtl.ALGORITHM,
    "local_only": local_only.ALGORITHM,
    "transfer": transfer.ALGORITHM,
}

__all__ = ["ALGORITHMS", "Algorithm", "ClassSums", "LocalUpdate", "PrivateQueries"]
