"""Networks of infinite width: their Gaussian process (NNGP) and tangent kernel (NTK), in closed form or by series."""

from ntkpipe.infinite.convolution import AveragePool as AveragePool
from ntkpipe.infinite.convolution import Conv as Conv
from ntkpipe.infinite.convolution import GlobalAveragePool as GlobalAveragePool
from ntkpipe.infinite.convolutional import Convolutional as Convolutional
from ntkpipe.infinite.layers import Activation as Activation
from ntkpipe.infinite.layers import Dense as Dense
from ntkpipe.infinite.layers import Flatten as Flatten
from ntkpipe.infinite.layers import LayerNorm as LayerNorm
from ntkpipe.infinite.layers import Residual as Residual
from ntkpipe.infinite.networks import FullyConnected as FullyConnected
from ntkpipe.infinite.networks import Sequential as Sequential
from ntkpipe.infinite.sphere import SphereSpectrum as SphereSpectrum
from ntkpipe.infinite.sphere import sphere_spectrum as sphere_spectrum
