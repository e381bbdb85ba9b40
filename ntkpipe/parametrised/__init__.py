"""Finite networks in the NTK, standard and maximal-update parametrisation, which converge to :mod:`ntkpipe.infinite`.

Weights are drawn from a ``torch.Generator``, each parameter from a stream of its own, so that what one layer holds does
not depend on the width of another.
"""

from ntkpipe.parametrised.layers import Conv2d as Conv2d
from ntkpipe.parametrised.layers import Dense as Dense
from ntkpipe.parametrised.layers import Pointwise as Pointwise
from ntkpipe.parametrised.networks import cnn as cnn
from ntkpipe.parametrised.networks import matching as matching
from ntkpipe.parametrised.networks import mlp as mlp
from ntkpipe.parametrised.outputs import Antisymmetric as Antisymmetric
from ntkpipe.parametrised.outputs import Scaled as Scaled
from ntkpipe.parametrised.outputs import antisymmetric as antisymmetric
from ntkpipe.parametrised.outputs import scaled as scaled
