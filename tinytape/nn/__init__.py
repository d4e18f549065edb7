"""Neural networks: modules, layers, recurrent cells and layers, losses, initialisation."""

from . import functional, init
from .cells import GRUCell, LSTMCell, RNNCell
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
from .recurrent import GRU, LSTM, RNN, Recurrent
from .regularise import Dropout

__all__ = [
    "GELU", "GRU", "LSTM", "RNN", "BCEWithLogitsLoss", "Buffer", "CrossEntropyLoss", "Dropout", "Embedding",
    "GRUCell", "GaussianNLLLoss", "HuberLoss", "Identity", "L1Loss", "LSTMCell", "LayerNorm", "Linear", "MSELoss",
    "Module", "ModuleDict", "ModuleList", "NLLLoss", "Parameter", "PinballLoss", "RNNCell", "ReLU", "Recurrent",
    "Sequential", "SiLU", "Sigmoid", "SmoothL1Loss", "Tanh", "functional", "functional_call", "init",
]  # fmt: skip
