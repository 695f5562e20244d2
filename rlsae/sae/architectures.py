"""The architectures by the name that a recipe gives them: to add one, add its file, its settings, and its line here."""

from __future__ import annotations

from rlsae.sae.batchtopk import BatchTopK
from rlsae.sae.gated import Gated
from rlsae.sae.jumprelu import JumpRelu
from rlsae.sae.matryoshka import Matryoshka
from rlsae.sae.member import Member
from rlsae.sae.relu import Relu
from rlsae.sae.tied_relu import TiedRelu
from rlsae.sae.topk import TopK

ARCHITECTURES: dict[str, type[Member]] = {
    "tied_relu": TiedRelu,
    "relu": Relu,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpRelu,
    "gated": Gated,
    "matryoshka": Matryoshka,
}
