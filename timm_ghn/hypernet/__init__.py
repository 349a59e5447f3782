"""The graph hypernetwork: a network that reads a computation graph and writes its parameters."""

from .config import GHNConfig, Images
from .ghn import GHN
from .tasks import sketch

__all__ = ["GHN", "GHNConfig", "Images", "sketch"]
