"""The proxy of activations whose scale each input has for itself."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from qframework.proxy.naming import qualified_name
from qframework.proxy.resolution import Resolution
from qframework.proxy.runtime_quant import ActQuantProxyFromInjector


class DynamicActQuantProxyFromInjector(ActQuantProxyFromInjector):
    """Quantizes activations by scales of their own: two results are on one grid only by chance.

    There is no scale or zero point without an input; that of a result is its ``scale``.
    """

    is_dynamic = True

    def _read_settings(self, resolution: Resolution, built: Any) -> None:
        super()._read_settings(resolution, built)
        self.source = None  # type: ignore[assignment]

    def _depends(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{qualified_name(self.tracked_module_list[0])}.{self.attribute}: {self.quantizer.__name__} is dynamic, "
            f"its {what} is another for each input; read that of the result (return_quant_tensor=True)"
        )

    def scale(self) -> Tensor | None:
        """None when quantization is off.

        Raises:
            RuntimeError: the scale depends on the input.
        """
        return self._depends("scale") if self.is_quant_enabled else None

    def zero_point(self) -> Tensor | None:
        """None when quantization is off; 0 where there is none.

        Raises:
            RuntimeError: the zero point depends on the input.
        """
        if self.is_quant_enabled and not self.is_symmetric:
            self._depends("zero point")
        return super().zero_point()
