"""Collection: the PyTorch reference networks are read only where PyTorch is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") else ["reference_torch.py"]
