"""Neural networks: modules, layers, recurrent cells and layers, losses, initialisation."""

from . import functional, init
from .cells import GRUCell, LSTMCell, RNNCell
from .layers import GRU, LSTM, RNN
from .linear import GELU, Embedding, Identity, LayerNorm, Linear, ReLU, Sigmoid, SiLU, Tanh
from .losses import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    GaussianNLLLoss,
    HuberLoss,
    L1Loss,
    MSELoss,
    NLLLoss,
    PinballLoss,
    SmoothL1Loss,
)
from .module import Buffer, Module, ModuleDict, ModuleList, Parameter, Sequential, functional_call
from .recurrent import Recurrent
from .regularise import Dropout
from .variants import (
    CoupledLSTMCell,
    LayerNormLSTMCell,
    MemoryAttentionCell,
    MinimalGatedUnitCell,
    PeepholeLSTMCell,
    ZoneoutLSTMCell,
)

__all__ = [
    "GELU", "GRU", "LSTM", "RNN", "BCEWithLogitsLoss", "Buffer", "CoupledLSTMCell", "CrossEntropyLoss", "Dropout",
    "Embedding", "GRUCell", "GaussianNLLLoss", "HuberLoss", "Identity", "L1Loss", "LSTMCell", "LayerNorm",
    "LayerNormLSTMCell", "Linear", "MSELoss", "MemoryAttentionCell", "MinimalGatedUnitCell", "Module", "ModuleDict",
    "ModuleList", "NLLLoss", "Parameter", "PeepholeLSTMCell", "PinballLoss", "RNNCell", "ReLU", "Recurrent",
    "Sequential", "SiLU", "Sigmoid", "SmoothL1Loss", "Tanh", "ZoneoutLSTMCell", "functional", "functional_call",
    "init",
]  # fmt: skip
