"""crossalign: move representations across modalities, both ways, and know whether it really helped.

Public names are importable from here; ``__init__.pyi`` lists them, and each is loaded when it is first used, so that importing
costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
